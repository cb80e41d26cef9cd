"""Attention over cached latents in the shapes of transformers, absorbed or expanded by rule.

    few queries, no gradient   absorbed: `mla.ops.mla_decode` straight on the latents
    many queries or training   expanded: `mla.ops.mla_prefill`, which keeps no keys and values
    any other mask, dropout    expanded through `kv_b_proj` itself and SDPA, as transformers does it

Dims: B batch, L queries, H heads, T cached keys, C latent width, N unrotated width, R rotated
width, V value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla.absorb import absorb_output, absorb_queries, effective_weight, split_kv_b
from mla.checks import UnsupportedError
from mla.integrations.transformers.masks import KeyRuns, boolean_mask, key_runs
from mla.ops import mla_decode, mla_prefill
from mla.ops.select import preferred
from mla.plan import should_absorb
from mla.view import CacheView


class Sizes(NamedTuple):
    """What the rule of `mla.plan.should_absorb` reads."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int


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
    L, T = query.shape[2], latent.shape[2]
    runs = key_runs(mask, L, T)
    weight = None if runs is None or dropout > 0.0 else _weight(kv_b_proj)
    if runs is None or weight is None:
        visible = boolean_mask(mask, L, T)
        return _attend_masked(
            query, latent, k_rope, kv_b_proj, nope_dim, value_dim, visible, scale, dropout
        )
    if runs.num_keys < T:
        latent, k_rope = latent[:, :, : runs.num_keys], k_rope[:, :, : runs.num_keys]
    dtype = _compute_dtype(query)
    query, latent, k_rope, weight = (x.to(dtype) for x in (query, latent, k_rope, weight))
    sizes: Any = Sizes(latent.shape[-1], nope_dim, value_dim)
    tensors = (query, latent, k_rope, weight)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not needs_grad and should_absorb(L, runs.num_keys, sizes):
        return _attend_absorbed(*tensors, nope_dim, value_dim, runs, scale, impl)
    return mla_prefill(
        query.transpose(1, 2),
        latent[:, 0],
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


def _attend_absorbed(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    weight: Tensor,
    N: int,
    V: int,
    runs: KeyRuns,
    scale: float,
    impl: Any,
) -> Tensor:
    B, H, _, width = query.shape
    q_nope_BLHN, q_rope_BLHR = query.transpose(1, 2).split([N, width - N], dim=-1)
    w_uk, w_uv = split_kv_b(weight, H, N, V)
    rows_BTW = joint_rows(latent, k_rope)
    lengths = runs.lengths
    if lengths is None:
        lengths = torch.full((B,), runs.num_keys, dtype=torch.int32, device=query.device)
    view = CacheView.dense(rows_BTW, lengths, C=latent.shape[-1], R=width - N, starts=runs.starts)
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
