"""Attention over cached latents in the shapes of transformers, absorbed or expanded by rule.

    few queries, no gradient   absorbed: `mla.ops.mla_decode` straight on the latents
    many queries or training   expanded: `mla.ops.mla_prefill`, which keeps no keys and values
    any other mask, dropout    expanded through `kv_b_proj` itself and SDPA, as transformers does it

Coded rows are decoded inside `mla_decode`, tile by tile. Where keys are expanded, the new tokens
see each other as they are and the earlier ones as they are stored, as in `mla.module`.

Dims: B batch, L queries, H heads, T cached keys, C latent width, N unrotated width, R rotated
width, V value width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla.absorb import (
    absorb_output,
    absorb_queries,
    effective_weight,
    split_kv_b,
    with_whole_gradient,
)
from mla.checks import UnsupportedError
from mla.integrations.transformers.masks import KeyRuns, boolean_mask, key_runs
from mla.ops import mla_decode, mla_gather, mla_prefill
from mla.ops.append import Rows
from mla.ops.select import preferred
from mla.plan import should_absorb
from mla.view import CacheView


class Sizes(NamedTuple):
    """What the rule of `mla.plan.should_absorb` reads."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int


class PlainKeys(NamedTuple):
    """Cached latents ``[B, 1, T, C]`` and shared keys ``[B, 1, T, R]`` as they are."""

    latent: Tensor
    k_rope: Tensor

    @property
    def num_keys(self) -> int:
        return self.latent.shape[2]

    @property
    def requires_grad(self) -> bool:
        return self.latent.requires_grad or self.k_rope.requires_grad

    def first(self, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[B, 1, num_keys, C]`` and ``[B, 1, num_keys, R]`` of the first keys."""
        if num_keys == self.num_keys:
            return self.latent.to(dtype), self.k_rope.to(dtype)
        return self.latent[:, :, :num_keys].to(dtype), self.k_rope[:, :, :num_keys].to(dtype)

    def view(self, runs: KeyRuns, dtype: torch.dtype) -> CacheView:
        """The visible keys for `mla_decode`."""
        latent, k_rope = self.first(runs.num_keys, dtype)
        rows_BTW = joint_rows(latent, k_rope)
        lengths = _lengths(runs, rows_BTW)
        C, R = latent.shape[-1], k_rope.shape[-1]
        return CacheView.dense(rows_BTW, lengths, C=C, R=R, starts=runs.starts)


class CodedKeys(NamedTuple):
    """Cached tokens as coded rows, and the new ones at their end also unquantised."""

    stored: CacheView
    fresh: Rows  # [B, L, C] and [B, L, R]

    @property
    def num_keys(self) -> int:
        return self.stored.max_length

    @property
    def requires_grad(self) -> bool:
        return False

    def first(self, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As of `PlainKeys`; the new tokens unquantised, 0 where nothing is stored."""
        latent, k_rope = (x.to(dtype) for x in self.fresh)
        L = latent.shape[1]
        if num_keys > L:
            held = mla_gather(self.stored, 0, num_keys, dtype=dtype)
            begin = (self.stored.lengths[:1] - L).long()  # the same in all rows
            positions = begin + torch.arange(L, device=latent.device)
            latent = held.latent.index_copy(1, positions, latent)
            k_rope = held.k_rope.index_copy(1, positions, k_rope)
        return latent[:, None], k_rope[:, None]

    def view(self, runs: KeyRuns, dtype: torch.dtype) -> CacheView:
        """The visible keys for `mla_decode`, where they lie."""
        lengths, starts = _lengths(runs, self.stored.rows), runs.starts
        return replace(self.stored, lengths=lengths, starts=starts, max_length=runs.num_keys)


def attend(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_proj: nn.Module,
    *,
    nope_dim: int,
    value_dim: int,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    impl: Any = "auto",
) -> Tensor:
    """Attend from rotated queries to cached latents and shared rotated keys.

        k_i = [W_UK_i latent | k_rope],  v_i = W_UV_i latent,  out_i = softmax(scale q_i k_i^T) v_i

    Differentiable; a gradient through the cached tensors themselves is kept too.

    Args:
        query: ``[B, H, L, N+R]``, unrotated part first.
        latent: ``[B, 1, T, C]``, the L new tokens last (or where the mask says).
        k_rope: ``[B, 1, T, R]``. Where both are slices of one ``[B, Z, C+R]`` buffer, latent first,
            nothing is copied; otherwise absorbed attention joins them once per call.
        kv_b_proj: layer from C to ``H*(N+V)``, anything `mla.absorb.effective_weight` takes.
        nope_dim, value_dim: N and V.
        mask: of `key_run_mask`, a bool or additive mask broadcastable to ``[B, H, L, T]``, or
            None: causal from the first key on, a single query sees every key.
        scale: multiplies scores before softmax.
        dropout: probability of dropping a weight; 0 outside training.
        impl: as in `mla.ops.mla_decode`; an op that it does not have takes ``"auto"``.

    Returns:
        ``[B, L, H, V]``, dtype of ``query`` or that of autocast; 0 where a query sees no key.

    Raises:
        UnsupportedError: ``kv_b_proj`` is not one plain matrix.
    """
    keys = PlainKeys(latent, k_rope)
    return attend_keys(query, keys, kv_b_proj, nope_dim, value_dim, mask, scale, dropout, impl)


def attend_keys(
    query: Tensor,
    keys: PlainKeys | CodedKeys,
    kv_b_proj: nn.Module,
    nope_dim: int,
    value_dim: int,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    impl: Any = "auto",
) -> Tensor:
    """`attend` to keys that may be coded; no gradient flows into coded ones."""
    L, T = query.shape[2], keys.num_keys
    runs = key_runs(mask, L, T)
    weight = None if runs is None or dropout > 0.0 else _weight(kv_b_proj)
    if runs is None or weight is None:
        latent, k_rope = keys if isinstance(keys, PlainKeys) else keys.first(T, query.dtype)
        visible = boolean_mask(mask, L, T)
        return _attend_masked(
            query, latent, k_rope, kv_b_proj, nope_dim, value_dim, visible, scale, dropout
        )
    dtype = _compute_dtype(query)
    query, weight = query.to(dtype), weight.to(dtype)
    C = weight.shape[-1]
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad or weight.requires_grad or keys.requires_grad
    )
    sizes: Any = Sizes(C, nope_dim, value_dim)
    if not needs_grad and should_absorb(L, runs.num_keys, sizes):
        view = keys.view(runs, dtype)
        return _attend_absorbed(query, view, weight, nope_dim, value_dim, scale, impl)
    latent, k_rope = keys.first(runs.num_keys, dtype)
    return mla_prefill(
        query.transpose(1, 2),
        with_whole_gradient(latent[:, 0], kv_b_proj),
        k_rope[:, 0],
        weight,
        scale=scale,
        key_starts=runs.starts,
        key_lengths=runs.lengths,
        impl=preferred(impl, "mla_prefill"),
    ).out


def _compute_dtype(query: Tensor) -> torch.dtype:
    """That of the queries, or what autocast would make of them; float64 is left alone as there."""
    device = query.device.type
    if query.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype


def _weight(kv_b_proj: nn.Module) -> Tensor | None:
    """The matrix of the layer; None where training needs the layer itself (dropout inside LoRA)."""
    try:
        return effective_weight(kv_b_proj)
    except UnsupportedError:
        if kv_b_proj.training:
            return None
        raise


def _lengths(runs: KeyRuns, like: Tensor) -> Tensor:
    """``[B]`` int32, one past the last visible key."""
    if runs.lengths is not None:
        return runs.lengths
    return torch.full((like.shape[0],), runs.num_keys, dtype=torch.int32, device=like.device)


def _attend_absorbed(
    query: Tensor, view: CacheView, weight: Tensor, N: int, V: int, scale: float, impl: Any
) -> Tensor:
    H, width = query.shape[1], query.shape[3]
    q_nope_BLHN, q_rope_BLHR = query.transpose(1, 2).split([N, width - N], dim=-1)
    w_uk, w_uv = split_kv_b(weight, H, N, V)
    q_latent = absorb_queries(q_nope_BLHN, w_uk)
    out = mla_decode(
        q_latent, q_rope_BLHR, view, scale=scale, impl=preferred(impl, "mla_decode")
    ).out
    return absorb_output(out, w_uv)


def joint_rows(latent: Tensor, k_rope: Tensor) -> Tensor:
    """Latents ``[B, 1, T, C]`` and keys ``[B, 1, T, R]`` as rows, in place where they are slices.

    A compiled graph cannot see addresses: there, slices of one ``[B, Z, C+R]`` buffer are taken to
    begin at its first row and to have the latent first, as `LatentCacheLayer` lays them out.

    Returns:
        ``[B, T, C+R]``.
    """
    latent, k_rope = latent[:, 0], k_rope[:, 0]
    B, T, C = latent.shape
    width = C + k_rope.shape[-1]
    if torch.compiler.is_compiling():
        base = latent._base
        if base is not None and base is k_rope._base and _is_buffer(base, B, T, width):
            return base[:, :T]
    elif (
        latent.dtype == k_rope.dtype
        and latent.stride() == k_rope.stride()
        and latent.stride(-1) == 1
        and latent.stride(-2) >= width
        and latent.untyped_storage().data_ptr() == k_rope.untyped_storage().data_ptr()
        and latent.storage_offset() + C == k_rope.storage_offset()
    ):
        return latent.as_strided((B, T, width), latent.stride())
    return torch.cat((latent, k_rope), dim=-1)


def _is_buffer(base: Tensor, B: int, T: int, width: int) -> bool:
    return base.ndim == 3 and base.shape[0] == B and base.shape[1] >= T and base.shape[2] == width


def _attend_masked(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_proj: nn.Module,
    N: int,
    V: int,
    mask: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The mathematics of transformers under any mask: expand everything, then SDPA."""
    H, L = query.shape[1], query.shape[2]
    if mask is not None and mask.dtype == torch.bool:
        # Slots that no query sees may hold anything, and 0 * NaN is NaN.
        is_seen = mask.any(dim=2).any(dim=1)[:, None, :, None]
        latent, k_rope = torch.where(is_seen, latent, 0), torch.where(is_seen, k_rope, 0)
    expanded = kv_b_proj(latent[:, 0]).unflatten(-1, (H, N + V)).transpose(1, 2)
    k_nope, value = expanded.split([N, V], dim=-1)
    key = torch.cat((k_nope, k_rope.to(k_nope.dtype).expand(-1, H, -1, -1)), dim=-1)
    out = nn.functional.scaled_dot_product_attention(
        query,
        key.to(query.dtype),
        value.to(query.dtype),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and L > 1,
        scale=scale,
    )
    return out.transpose(1, 2)
