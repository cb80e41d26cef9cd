"""Expanded attention in plain PyTorch, forward and backward, without keeping K and V.

    k_i = [W_UK_i c | k_rope],  v_i = W_UV_i c,  out_i = softmax(scale * q_i . k_i) v_i

K and V are expanded for a few heads at a time and dropped. Values are padded to the key width,
because the fused attention of PyTorch for CPUs takes one width only. A block of queries at the end
of longer keys is two calls, all earlier keys and the causal block, merged by log-sum-exp, so no
mask is ever built. The backward pass expands again and feeds both calls the merged output and lse.

Dims: B batch, L queries, S keys, H heads, h heads of one group, C latent width, N unrotated width,
R rotated width, V value width, E padded width.
Oracle: mla.reference.expanded_attention. Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mla.kernels.eager.decode import lse_dtype, merge
from mla.kernels.eager.flash import flash_backward, flash_forward
from mla.kernels.prefill_types import Gradients, Masking, Sizes, sizes_of

# Elements of K and V together that may be alive at once: 128 MiB in float32.
MAX_EXPANDED = 1 << 25


class Run(NamedTuple):
    """One rectangle of attention: batch rows, their queries and their visible keys."""

    batch: slice
    queries: slice
    keys: slice


def prefill(
    query: Tensor,  # [B, L, H, N+R]; packed: B = 1
    latent: Tensor,  # [B, S, C]
    k_rope: Tensor,  # [B, S, R]
    kv_b_weight: Tensor,  # [H*(N+V), C]
    scale: float,
    masking: Masking,
    out_dtype: torch.dtype,
    save_expanded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out ``[B, L, H, V]``, lse ``[B, L, H]`` and, to be saved, ``[B, S, H, N+V]``."""
    sizes = sizes_of(query, k_rope, kv_b_weight)
    B, L, H, _ = query.shape
    out = query.new_zeros(B, L, H, sizes.V, dtype=out_dtype)
    lse = torch.full((B, L, H), float("-inf"), dtype=lse_dtype(query), device=query.device)
    expanded = query.new_zeros(B, latent.shape[1], H, sizes.N + sizes.V) if save_expanded else None
    for run in _runs(L, latent.shape[1], B, masking):
        for heads in _head_groups(run, sizes, query.shape[1], latent.shape[1]):
            weight = kv_b_weight.unflatten(0, (H, -1))[heads]
            kv = _expand(latent[run.batch, run.keys], weight)
            if expanded is not None:
                expanded[run.batch, run.keys, heads] = kv
            part, part_lse = _attend(
                query[run.batch, run.queries, heads],
                kv,
                k_rope[run.batch, run.keys],
                sizes,
                scale,
                masking.causal,
            )
            out[run.batch, run.queries, heads] = part.to(out_dtype)
            lse[run.batch, run.queries, heads] = part_lse
    return out, lse, query.new_empty(0) if expanded is None else expanded


def prefill_backward(
    grad_out: Tensor,  # [B, L, H, V]
    grad_lse: Tensor | None,  # [B, L, H]
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    out: Tensor,
    lse: Tensor,
    expanded: Tensor,
    scale: float,
    masking: Masking,
) -> Gradients:
    """Gradients of query, latent, k_rope and kv_b_weight."""
    sizes = sizes_of(query, k_rope, kv_b_weight)
    H, C = sizes.H, latent.shape[-1]
    sum_dtype = lse_dtype(query)
    d_query = torch.zeros_like(query)
    d_latent = torch.zeros_like(latent, dtype=sum_dtype)
    d_k_rope = torch.zeros_like(k_rope, dtype=sum_dtype)
    d_weight = torch.zeros_like(kv_b_weight, dtype=sum_dtype).unflatten(0, (H, -1))
    for run in _runs(query.shape[1], latent.shape[1], query.shape[0], masking):
        latent_run = latent[run.batch, run.keys]
        for heads in _head_groups(run, sizes, query.shape[1], latent.shape[1]):
            weight = kv_b_weight.unflatten(0, (H, -1))[heads]
            kv = (
                expanded[run.batch, run.keys, heads]
                if expanded.numel()
                else _expand(latent_run, weight)
            )
            at = (run.batch, run.queries, heads)
            dq, dk, dv = _attend_backward(
                grad_out[at],
                None if grad_lse is None else grad_lse[at],
                query[at],
                kv,
                k_rope[run.batch, run.keys],
                out[at],
                lse[at],
                sizes,
                scale,
                masking.causal,
            )
            d_query[at] = dq
            d_k_rope[run.batch, run.keys] += dk[..., sizes.N :].sum(2, dtype=sum_dtype)
            dkv = torch.cat([dk[..., : sizes.N], dv], dim=-1).flatten(2)  # [b, s, h*(N+V)]
            d_latent[run.batch, run.keys] += dkv @ weight.flatten(0, 1)
            d_weight[heads] += (dkv.flatten(0, 1).T @ latent_run.flatten(0, 1)).unflatten(
                0, weight.shape[:2]
            )
    return Gradients(
        d_query,
        d_latent.to(latent.dtype),
        d_k_rope.to(k_rope.dtype),
        d_weight.reshape(-1, C).to(kv_b_weight.dtype),
    )


def _runs(L: int, S: int, B: int, masking: Masking) -> Iterator[Run]:
    """Rectangles with their keys cut to the visible ones; queries that see none are left out."""
    if masking.cu_seqlens_q is not None and masking.cu_seqlens_k is not None:
        ends_q, ends_k = masking.cu_seqlens_q.tolist(), masking.cu_seqlens_k.tolist()
        for i in range(len(ends_q) - 1):
            yield from _rectangle(
                slice(0, 1), ends_q[i], ends_q[i + 1], ends_k[i], ends_k[i + 1], masking.causal
            )
        return
    starts = [0] * B if masking.key_starts is None else masking.key_starts.tolist()
    ends = [S] * B if masking.key_lengths is None else masking.key_lengths.tolist()
    b0 = 0
    for b in range(1, B + 1):
        if b < B and (starts[b], ends[b]) == (starts[b0], ends[b0]):
            continue
        yield from _rectangle(slice(b0, b), 0, L, starts[b0], ends[b0], masking.causal)
        b0 = b


def _rectangle(batch: slice, q0: int, q1: int, k0: int, k1: int, causal: bool) -> Iterator[Run]:
    if causal:
        q0 = max(q0, q1 - (k1 - k0))
    if q1 > q0 and k1 > k0:
        yield Run(batch, slice(q0, q1), slice(k0, k1))


def _head_groups(run: Run, sizes: Sizes, L: int, S: int) -> Iterator[slice]:
    """Slices of heads whose expanded keys and values fit into `MAX_EXPANDED`."""
    b = run.batch.stop - run.batch.start
    s = run.keys.stop - run.keys.start
    size = max(1, MAX_EXPANDED // (2 * b * s * max(sizes.N + sizes.R, sizes.V)))
    for first in range(0, sizes.H, size):
        yield slice(first, min(first + size, sizes.H))


def _expand(latent: Tensor, weight: Tensor) -> Tensor:
    """latent ``[b, s, C]`` by weight ``[h, N+V, C]`` -> ``[b, s, h, N+V]``."""
    return F.linear(latent, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


def _keys_values(kv: Tensor, k_rope: Tensor, sizes: Sizes, width: int) -> tuple[Tensor, Tensor]:
    """``[b, h, s, E]`` keys and values from ``kv [b, s, h, N+V]``, zero-padded to one width."""
    b, s, h, _ = kv.shape
    keys = kv.new_zeros(b, h, s, width)
    keys[..., : sizes.N] = kv[..., : sizes.N].transpose(1, 2)
    keys[..., sizes.N : sizes.N + sizes.R] = k_rope[:, None]
    values = kv.new_zeros(b, h, s, width)
    values[..., : sizes.V] = kv[..., sizes.N :].transpose(1, 2)
    return keys, values


def _pad(x: Tensor, width: int) -> Tensor:
    """``[b, l, h, *]`` -> ``[b, h, l, E]``, last dim contiguous: the fused kernel assumes that."""
    padded = F.pad(x.transpose(1, 2), (0, width - x.shape[-1]))
    return padded if padded.stride(-1) == 1 else padded.contiguous()


def _attend(
    query: Tensor, kv: Tensor, k_rope: Tensor, sizes: Sizes, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """out ``[b, l, h, V]`` and lse ``[b, l, h]`` of one rectangle, bottom-right causal."""
    L, S = query.shape[1], kv.shape[1]
    width = max(sizes.N + sizes.R, sizes.V)
    q = _pad(query, width)
    keys, values = _keys_values(kv, k_rope, sizes, width)
    past = S - L if causal else 0
    out, lse = flash_forward(q, keys[:, :, past:], values[:, :, past:], causal, scale)
    if past:
        earlier = flash_forward(q, keys[:, :, :past], values[:, :, :past], False, scale)
        out, lse = merge(torch.stack([out, earlier[0]]), torch.stack([lse, earlier[1]]))
    return out[..., : sizes.V].transpose(1, 2), lse.transpose(1, 2)


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    out: Tensor,
    lse: Tensor,
    sizes: Sizes,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``[b, l, h, N+R]``, keys ``[b, s, h, N+R]``, values ``[b, s, h, V]``."""
    L, S = query.shape[1], kv.shape[1]
    # One spare column carries the gradient of lse: the kernel subtracts sum(grad_out * out) from
    # every score gradient, so grad_out = 1 and out = -grad_lse there add grad_lse instead.
    width = max(sizes.N + sizes.R, sizes.V + (grad_lse is not None))
    q, d_out, out = _pad(query, width), _pad(grad_out, width), _pad(out, width)
    if grad_lse is not None:
        d_out[..., sizes.V] = 1
        out[..., sizes.V] = -grad_lse.transpose(1, 2)
    keys, values = _keys_values(kv, k_rope, sizes, width)
    lse = lse.transpose(1, 2)
    past = S - L if causal else 0
    dq, dk, dv = flash_backward(
        d_out, q, keys[:, :, past:], values[:, :, past:], out, lse, causal, scale
    )
    if past:
        earlier = flash_backward(
            d_out, q, keys[:, :, :past], values[:, :, :past], out, lse, False, scale
        )
        dq = dq + earlier[0]
        dk = torch.cat([earlier[1], dk], dim=2)
        dv = torch.cat([earlier[2], dv], dim=2)
    E = sizes.N + sizes.R
    return (
        dq[..., :E].transpose(1, 2),
        dk[..., :E].transpose(1, 2),
        dv[..., : sizes.V].transpose(1, 2),
    )
