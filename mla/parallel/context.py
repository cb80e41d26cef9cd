"""Context parallelism: one long context over the ranks of a group, exact, by moving little.

    decode    each rank keeps every k-th page of the cache and attends to it; the results are
              merged by their log-sum-exp:

                  (k-1) * B * L * H * (W + 1) * 4 bytes      a layer and step, one all-gather

              with W = C, or W = V where W_UV is applied before the merge (as the layer does: the
              merge is linear in the outputs). Nothing grows with the context.
    prefill   each rank has the tokens of two chunks, in zigzag order, and gets the latents of all:

                  (k-1) * B * S/k * (C + R) * e bytes        a layer, one all-gather
                  the same again in the backward pass, one reduce-scatter

              with e bytes a number. Keys and values of all heads would take H * (N + R + V)
              numbers for each C + R: with DeepSeek-V3's sizes 71 times the bytes.

Payload that each rank receives, as `mla.parallel.traffic` counts it. Out and lse travel in one
buffer, in float32 (float64 for float64 queries). An all-gather and no all-to-all by heads: it is
one collective for any number of heads and leaves every rank with the whole result, the same bits
on all; an all-to-all moves 1/k of the bytes, but each rank then has H/k heads and a second
collective has to put them together.

Dims: B batch, L queries of this rank, S positions of all ranks, H heads (of this rank, where heads
are sharded too), C latent, N unrotated, R rotated, V value width, k ranks, Z positions in a page.
Source: exact merging by log-sum-exp as in Flash-Decoding; exchange of latents follows from MLA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mla.absorb import absorb_output
from mla.checks import ShapeError, bind_dims
from mla.ops import merge_partials, mla_decode, mla_prefill
from mla.ops.decode import AttentionOutput
from mla.ops.prefill import Save
from mla.ops.select import Impl
from mla.parallel.sequence import Group, all_gather, gather_sequence, process_group, shard_of
from mla.view import CacheView, check_shard


def shard_view(view: CacheView, shard: tuple[int, int], *, page_size: int) -> CacheView:
    """Every k-th page of a whole cache, as the ops read a shard; nothing is copied.

    For decoding in parallel from a cache that every rank holds whole, and for handing such a cache
    over. A `PagedLatentCache` with ``shard=`` holds its shard alone.

    Args:
        view: of a whole cache. Paged: in pages of ``page_size``. Dense: the capacity of a row has
            to be a multiple of it.
        shard: (index, count), see `mla.parallel.sequence.shard_of`.
        page_size: Z.

    Raises:
        ShapeError: the view cannot be cut so.
    """
    check_shard("shard_view", shard)
    index, count = shard
    B, capacity = view.batch_size, view.rows.shape[1]
    rows, table = view.rows, view.page_table
    if view.shard != (0, 1) or (table is not None and capacity != page_size):
        raise ShapeError(
            f"shard_view: view has shard {view.shard} and pages of {capacity}, expected (0, 1) "
            f"and {page_size}"
        )
    if table is None:
        if page_size < 1 or capacity % page_size or not rows.is_contiguous():
            raise ShapeError(
                f"shard_view: view has {capacity} positions a row and strides {rows.stride()}, "
                f"expected contiguous rows and a multiple of page_size={page_size}"
            )
        rows = rows.view(-1, page_size, rows.shape[2])
        table = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device).view(B, -1)
    columns = -(-table.shape[1] // count)  # the same on all ranks: padded with any page
    padded = torch.cat([table, table.new_zeros(B, columns * count - table.shape[1])], dim=1)
    return replace(
        view, rows=rows, page_table=padded[:, index::count].contiguous(), shard=shard
    ).validated()


def context_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    *,
    scale: float,
    group: Group,
    w_uv: Tensor | None = None,
    query_lengths: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> AttentionOutput:
    """`mla.ops.mla_decode` over a cache whose pages are cut over the ranks of ``group``.

    Each rank attends to its own pages; one all-gather merges the results exactly. A rank without
    any key of a row takes no part in its result. All ranks get the same bits.

    Args:
        q_latent, q_rope: ``[B, L, H, C]`` and ``[B, L, H, R]``, the same on all ranks.
        view: of this rank's pages; its shard is `shard_of` ``group``. Lengths count all positions.
        scale, query_lengths, out_dtype, impl: see `mla.ops.mla_decode`.
        group: of the ranks that hold the context; a mesh with one dim serves too.
        w_uv: ``[H, V, C]``; given, W_UV is applied to each part before the merge, which moves V
            numbers a head instead of C.

    Returns:
        out: ``[B, L, H, C]`` or ``[B, L, H, V]``; 0 where a query sees no key.
        lse: ``[B, L, H]``; ``-inf`` there.

    Raises:
        ShapeError: the shard of ``view`` is not this rank's, or as `mla_decode`.
        UnsupportedError: as `mla_decode`.
    """
    shard = shard_of(group)
    if view.shard != shard:
        raise ShapeError(
            f"context_decode: view has shard {view.shard}, expected {shard}, (rank, size) of the "
            "group; build the cache with shard=shard_of(group)"
        )
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    out, lse = mla_decode(
        q_latent,
        q_rope,
        view,
        scale=scale,
        query_lengths=query_lengths,
        out_dtype=wide if w_uv is None else q_latent.dtype,
        impl=impl,
    )
    if w_uv is not None:
        bind_dims(
            "context_decode", "w_uv", w_uv, "H V C", dict(zip("BLHC", out.shape, strict=True))
        )
        out = absorb_output(out, w_uv)
    merged = merge_ranks(out.to(wide), lse, group)
    return AttentionOutput(merged.out.to(out_dtype or q_latent.dtype), merged.lse)


def merge_ranks(out: Tensor, lse: Tensor, group: Group) -> AttentionOutput:
    """Merge what the ranks found over different keys, by one all-gather; the same bits on all.

    Args:
        out: ``[B, L, H, W]`` float32 or float64, of the same shape on all ranks.
        lse: ``[B, L, H]`` natural log, dtype of ``out``; -inf where a rank saw no key, and then
            ``out`` may hold anything.
        group: of the ranks.

    Returns:
        As `mla.ops.merge_partials`; not differentiable.
    """
    members = process_group(group)
    if members.size() == 1:
        return AttentionOutput(out, lse)
    packed = torch.cat([out, lse[..., None]], dim=-1)
    parts = all_gather(packed, members).unflatten(0, (members.size(), out.shape[0]))
    return merge_partials(parts[..., :-1].contiguous(), parts[..., -1].contiguous())


def context_prefill(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    scale: float,
    group: Group,
    out_dtype: torch.dtype | None = None,
    save: Save = "latent",
    impl: Impl = "auto",
) -> AttentionOutput:
    """Causal `mla.ops.mla_prefill` over a sequence that is cut over the ranks of ``group``.

    Each rank has the tokens of `mla.parallel.sequence.shard_sequence`, gets the latents of the
    others and attends with its own queries. Differentiable in the four tensors, also through lse:
    gradients of ``query``, ``latent`` and ``k_rope`` are those of a single process, cut in the same
    way; that of ``kv_b_weight``, which all ranks have, is this rank's share, as with every other
    weight of a model: the sum over the group is the whole (`sum_gradients`, DDP, FSDP).

    Args:
        query: ``[B, L, H, N+R]`` of this rank's tokens.
        latent, k_rope: ``[B, L, C]`` and ``[B, L, R]`` of this rank's tokens.
        kv_b_weight: ``[H*(N+V), C]``.
        group: of the ranks that hold the sequence; a mesh with one dim serves too.
        scale, out_dtype, save, impl: see `mla.ops.mla_prefill`.

    Returns:
        out: ``[B, L, H, V]`` of this rank's tokens.
        lse: ``[B, L, H]``.

    Raises:
        ShapeError: L is odd, or as `mla_prefill`.
    """
    sizes: dict[str, int] = {}
    bind_dims("context_prefill", "query", query, "B L H E", sizes)
    bind_dims("context_prefill", "latent", latent, "B L C", sizes)
    bind_dims("context_prefill", "k_rope", k_rope, "B L R", sizes)
    keys = gather_rows(latent, k_rope, group)
    return attend_shard(
        query,
        *keys,
        kv_b_weight,
        shard=shard_of(group),
        scale=scale,
        out_dtype=out_dtype,
        save=save,
        impl=impl,
    )


def gather_rows(latent: Tensor, k_rope: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """``[B, S, C]`` and ``[B, S, R]`` of the whole sequence from the shards, by one all-gather."""
    rows = gather_sequence(torch.cat([latent, k_rope], dim=-1), group)
    return rows[..., : latent.shape[-1]], rows[..., latent.shape[-1] :]


def attend_shard(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    shard: tuple[int, int],
    **options: Any,
) -> AttentionOutput:
    """Attention of a shard's queries ``[B, L, H, N+R]`` over the whole ``latent [B, S, C]``."""
    index, count = shard
    size = query.shape[1] // 2
    parts = [
        mla_prefill(part, latent[:, :end], k_rope[:, :end], kv_b_weight, **options)
        for part, end in zip(
            query.split(size, dim=1) if size else (query,),
            ((index + 1) * size, (2 * count - index) * size),
            strict=False,
        )
    ]
    return AttentionOutput(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)))


def sum_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Add up the gradients of all ranks, in place, by one all-reduce for each dtype.

    For a training loop without DDP or FSDP. The loss of each rank has to be its share of the sum
    over all tokens.

    Args:
        parameters: the same on all ranks, with gradients on the same ones.
        group: of the ranks.
    """
    members = process_group(group)
    grads: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            grads.setdefault(grad.dtype, []).append(local)
    for parts in grads.values():
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=members)
        sizes = [part.numel() for part in parts]
        for part, whole in zip(parts, flat.split(sizes), strict=True):
            part.copy_(whole.view_as(part))
