"""Attention of continuous batching: latents in the pages of transformers' pool, read in place.

transformers cuts its pool into blocks, one block for ``page_size`` tokens of one request in all
layers, and keeps two halves of equal width, keys and values, for each layer and token. With one
head of half a latent row the two halves together are as large as the row, and the pool is

    [blocks, layers, Z, W]     one page [Z, W] of rows for each block and layer

so layer i is the paged `CacheView` of rows ``[:, i]`` under the block ids of each request: nothing
is copied, moved or held twice. Coded rows fit too, their W bytes are a multiple of 16.

A batch packs the new tokens of all requests into one row of T. Each token is written as a row of
its own; then requests are attended to as `mla.module` does it: the first tokens of a request are
expanded from what they are, few new tokens decode absorbed, many are expanded with their past. So
with coded rows, where transformers cuts a prompt or finds a shared prefix shows in the result.

Dims: T new tokens, B requests, L new tokens of each, H heads, Z positions in one page, W row width,
C latent width, N unrotated, R rotated and V value width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from mla.absorb import absorb_output, absorb_queries, effective_weight, split_kv_b
from mla.checks import UnsupportedError
from mla.codec import Codec
from mla.integrations.transformers.attend import Sizes
from mla.ops import mla_append, mla_decode, mla_gather, mla_prefill
from mla.ops.select import preferred
from mla.plan import should_absorb
from mla.view import CacheView


class Share(NamedTuple):
    """What one request has in a batch."""

    pages: list[int]  # of all its tokens
    past: int  # tokens cached before this batch
    new: int  # tokens in this batch


class Group(NamedTuple):
    """Requests of one batch that are attended to in the same call."""

    shares: list[Share]
    tokens: Tensor  # [sum of new] int64, places in the batch
    boundaries: Tensor  # [B+1] int32, of the packed new tokens
    page_table: Tensor  # [B, M] int32
    lengths: Tensor  # [B] int32, new tokens counted

    @property
    def max_length(self) -> int:
        return max(share.past + share.new for share in self.shares)


class Groups(NamedTuple):
    """The requests of one batch, by how they are attended to."""

    cold: list[Group]  # nothing cached before: at most one group
    absorbed: list[Group]  # one group for each number of new tokens
    expanded: list[Group]  # one group for each request


class Batch:
    """The requests of one forward pass, and tensors that all layers share, made when needed.

    Args:
        page_size: Z.
        device: of the pool.
    """

    def __init__(self, page_size: int, device: torch.device) -> None:
        self.page_size, self.device = page_size, device
        self.shares: list[Share] = []
        self._slots: tuple[Tensor, Tensor] | None = None
        self._groups: dict[Sizes, Groups] = {}

    def add(self, pages: list[int], past: int, new: int) -> None:
        """Append a request that has these pages, in order."""
        used = -(-(past + new) // self.page_size)
        self.shares.append(Share(pages[:used], past, new))

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Page of each new token ``[T, 1]`` and one past its slot there ``[T]``, both int32."""
        if self._slots is None:
            Z = self.page_size
            places = [
                (share.pages[position // Z], position % Z + 1)
                for share in self.shares
                for position in range(share.past, share.past + share.new)
            ]
            places_T2 = torch.tensor(places, dtype=torch.int32).to(self.device)
            self._slots = places_T2[:, :1].contiguous(), places_T2[:, 1].contiguous()
        return self._slots

    def groups(self, sizes: Sizes) -> Groups:
        """The requests by how a layer of these sizes attends to them."""
        if sizes not in self._groups:
            cold: list[int] = []
            alike: dict[int, list[int]] = {}
            many: list[list[int]] = []
            for index, (_, past, new) in enumerate(self.shares):
                config: Any = sizes
                if past == 0:
                    cold.append(index)
                elif should_absorb(new, past + new, config):
                    alike.setdefault(new, []).append(index)
                else:
                    many.append([index])
            chosen = ([cold] if cold else [], alike.values(), many)
            self._groups[sizes] = Groups(*([self._group(x) for x in kind] for kind in chosen))
        return self._groups[sizes]

    def _group(self, indices: Iterable[int]) -> Group:
        begins = [0]
        for share in self.shares:
            begins.append(begins[-1] + share.new)
        chosen = list(indices)
        shares = [self.shares[index] for index in chosen]
        tokens = [t for index in chosen for t in range(begins[index], begins[index + 1])]
        boundaries = [0]
        for share in shares:
            boundaries.append(boundaries[-1] + share.new)
        width = max(len(share.pages) for share in shares)
        table = [share.pages + [0] * (width - len(share.pages)) for share in shares]
        lengths = [share.past + share.new for share in shares]
        int32 = [torch.tensor(x, dtype=torch.int32) for x in (boundaries, table, lengths)]
        return Group(
            shares, torch.tensor(tokens).to(self.device), *(x.to(self.device) for x in int32)
        )


class PagedLatents(PagedAttentionCache):
    """The pool of transformers, holding latent rows; `continuous` makes it of a stock one.

    Which requests a batch has is noted while transformers prepares it, on the host, so that no
    step reads a table back from the device. The indices of all cached tokens, which transformers
    lists at every step to copy them, are not made.
    """

    codec: Codec
    batch: Batch
    _prepared: Any  # the list that transformers fills for the batch of `batch`

    def hold_latents_(self, codec: Codec, row_bytes: int) -> None:
        """Read pages as rows of ``codec`` from now on.

        Raises:
            UnsupportedError: this transformers lays its pages out in another way.
        """
        (allocator,) = self.cache_allocators.values()
        page_bytes = allocator.tokens_per_page * row_bytes
        expected = (page_bytes, len(allocator.layer_indices) * page_bytes)
        held = (allocator.bytes_per_page, allocator.bytes_per_block)
        if held != expected:
            raise UnsupportedError(
                f"generate_batch: pages and blocks of transformers {transformers.__version__} have "
                f"{held} bytes, expected {expected}: one row of {row_bytes} bytes for each token "
                "and layer; generate() works with this one"
            )
        self.codec, self._prepared = codec, None
        self.batch = Batch(allocator.tokens_per_page, self.cache_tensor.device)

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: Any,
        write_index: Any,
    ) -> None:
        """Called for each request of a batch, with the same lists."""
        (allocator,) = self.cache_allocators.values()
        if write_index is not self._prepared:
            self._prepared = write_index
            self.batch = Batch(allocator.tokens_per_page, self.cache_tensor.device)
        super().extend_read_and_write_indices(
            request_id, past_length, query_length, None, write_index
        )
        self.batch.add(allocator.block_table[request_id], past_length, query_length)

    def rows(self, layer_idx: int, C: int, R: int) -> Tensor:
        """The pages of one layer in all blocks, ``[blocks, Z, W]``; a view of the pool."""
        (allocator,) = self.cache_allocators.values()
        stored = self.cache_tensor.view(self.codec.storage_dtype(self.dtype))
        num_layers, Z = len(allocator.layer_indices), allocator.tokens_per_page
        num_blocks = self.cache_tensor.numel() // allocator.bytes_per_block
        pages = stored.view(num_blocks, num_layers, Z, -1)
        place = allocator.layer_indices.index(layer_idx)
        return pages[:, place, :, : self.codec.row_width(C, R)]


def attend_batch(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_proj: nn.Module,
    cache: PagedLatents,
    layer_idx: int,
    *,
    nope_dim: int,
    value_dim: int,
    scale: float,
    impl: Any = "auto",
) -> Tensor:
    """Cache the new tokens of a batch, then attend from each to its own request.

    Args:
        query: ``[1, H, T, N+R]``, unrotated part first.
        latent: ``[1, 1, T, C]``, of the new tokens only.
        k_rope: ``[1, 1, T, R]``.
        kv_b_proj: layer from C to ``H*(N+V)``.
        cache: prepared for this batch; its rows of the layer change in place.
        layer_idx: which layer.
        nope_dim, value_dim: N and V.
        scale: multiplies scores before softmax.
        impl: as in `mla.ops.mla_decode`; an op that it does not have takes ``"auto"``.

    Returns:
        ``[1, T, H, V]``, dtype of ``query``.
    """
    batch = cache.batch
    latent_TC, k_rope_TR = latent[0, 0], k_rope[0, 0]
    rows = cache.rows(layer_idx, latent.shape[-1], k_rope.shape[-1])
    layer = _Layer(
        rows=rows,
        codec=cache.codec,
        latent=latent_TC.to(query.dtype),
        k_rope=k_rope_TR.to(query.dtype),
        weight=effective_weight(kv_b_proj).to(query.dtype),
        nope_dim=nope_dim,
        value_dim=value_dim,
        scale=scale,
        impl=impl,
    )
    pages, ends = batch.slots
    token_view = layer.view(pages, ends, batch.page_size)
    mla_append(
        token_view,
        layer.latent[:, None],
        layer.k_rope[:, None],
        impl=preferred(impl, "mla_append"),
    )
    query_THE = query[0].transpose(0, 1)
    out = query.new_empty(query_THE.shape[0], query_THE.shape[1], value_dim)
    groups = batch.groups(Sizes(latent.shape[-1], nope_dim, value_dim))
    for attend, chosen in zip((layer.cold, layer.absorbed, layer.expanded), groups, strict=True):
        for group in chosen:
            out[group.tokens] = attend(query_THE[group.tokens], group)
    return out[None]


class _Layer(NamedTuple):
    """One attention layer over one batch; methods return ``[tokens of the group, H, V]``."""

    rows: Tensor  # [blocks, Z, W]
    codec: Codec
    latent: Tensor  # [T, C] of the new tokens, unquantised
    k_rope: Tensor  # [T, R]
    weight: Tensor  # [H*(N+V), C]
    nope_dim: int
    value_dim: int
    scale: float
    impl: Any

    def view(self, page_table: Tensor, lengths: Tensor, max_length: int) -> CacheView:
        return CacheView.paged(
            self.rows,
            page_table,
            lengths,
            C=self.latent.shape[-1],
            R=self.k_rope.shape[-1],
            codec=self.codec,
            max_length=max_length,
        )

    def cold(self, query: Tensor, group: Group) -> Tensor:
        """Requests whose tokens are all new."""
        return mla_prefill(
            query,
            self.latent[group.tokens],
            self.k_rope[group.tokens],
            self.weight,
            scale=self.scale,
            cu_seqlens_q=group.boundaries,
            max_q=group.max_length,
            max_k=group.max_length,
            impl=preferred(self.impl, "mla_prefill"),
        ).out

    def absorbed(self, query: Tensor, group: Group) -> Tensor:
        """Requests with the same few new tokens, from the pages where they lie."""
        H, N, V = query.shape[1], self.nope_dim, self.value_dim
        query_BLHE = query.unflatten(0, (len(group.shares), -1))
        q_nope, q_rope = query_BLHE.split([N, query.shape[-1] - N], dim=-1)
        w_uk, w_uv = split_kv_b(self.weight, H, N, V)
        out = mla_decode(
            absorb_queries(q_nope, w_uk),
            q_rope,
            self.view(group.page_table, group.lengths, group.max_length),
            scale=self.scale,
            impl=preferred(self.impl, "mla_decode"),
        ).out
        return absorb_output(out, w_uv).flatten(0, 1)

    def expanded(self, query: Tensor, group: Group) -> Tensor:
        """One request with many new tokens, which see each other unquantised."""
        view = self.view(group.page_table, group.lengths, group.max_length)
        held = mla_gather(view, 0, group.shares[0].past, dtype=query.dtype)
        return mla_prefill(
            query[None],
            torch.cat((held.latent, self.latent[group.tokens][None]), dim=1),
            torch.cat((held.k_rope, self.k_rope[group.tokens][None]), dim=1),
            self.weight,
            scale=self.scale,
            impl=preferred(self.impl, "mla_prefill"),
        ).out[0]
