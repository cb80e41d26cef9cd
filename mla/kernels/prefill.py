"""Expanded attention over fresh latents, forward: softmax(scale * q k^T) v with a shared key part.

    scores_LS = scale * (q_nope_LN . k_nope_SN + q_rope_LR . k_rope_SR)
    out_LV    = softmax over S of scores_LS, applied to value_SV

Keys and values lie side by side as they are expanded, ``[S, h, N+V]`` for a group of h heads, which
bounds their memory. The rotated key part is one row for all heads and is read where it lies. Padded
batches and packed sequences are the same to the kernel: tokens of flattened tensors, and one span
of queries and of keys for each sequence. Tiles begin at the first query and the first visible key
of a sequence, so its result does not depend on what else is in the batch.

Dims: T query tokens, T' key tokens, L queries, S keys, H heads, h heads of one group, C latent
width, N unrotated width, R rotated width, V value width.
Oracle: mla.reference.expanded_attention. Source: FlashAttention-2, arXiv:2307.08691.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla.kernels.expand import expand
from mla.kernels.prefill_backward import prefill_backward
from mla.kernels.prefill_operands import flatten
from mla.kernels.prefill_tiles import (
    LN_2,
    LOG2_E,
    VARYING,
    add_product,
    dot_rows,
    load_parts,
    num_parts,
    sequence_span,
    store_parts,
    visible_limits,
    zero_parts,
)
from mla.kernels.prefill_types import Masking

__all__ = ["prefill", "prefill_backward"]


@triton.jit
def _attend(
    state,  # (accumulators, largest score, sum of weights)
    q,
    kv_ptr,
    rope_ptr,
    kv_stride,
    rope_stride,
    begin,
    end,
    k_count,
    limit_L,  # [L] keys that each query sees
    log2_scale,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
    dot_dtype: tl.constexpr,
):
    """Continue the softmax over keys ``begin .. end``; without MASKED all queries see them all."""
    acc, top, total = state
    s = tl.arange(0, BLOCK_S)
    for first in tl.range(begin, end, BLOCK_S):
        is_key_S = first + s < k_count
        kv_row = kv_ptr + tl.cast(first, tl.int64) * kv_stride
        rope_row = rope_ptr + tl.cast(first, tl.int64) * rope_stride
        keys = load_parts(kv_row, s * kv_stride, is_key_S, N, MASKED, dot_dtype)
        keys += load_parts(rope_row, s * rope_stride, is_key_S, R, MASKED, dot_dtype)
        scores_LS = dot_rows(q, keys, num_parts(N) + num_parts(R))
        if MASKED:
            is_seen_LS = (first + s)[None, :] < limit_L[:, None]
            scores_LS = tl.where(is_seen_LS, scores_LS, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores_LS, axis=1) * log2_scale)
        shift = new_top
        if MASKED:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
        weights_LS = tl.exp2(scores_LS * log2_scale - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights_LS, axis=1)
        values = load_parts(kv_row + N, s * kv_stride, is_key_S, V, MASKED, dot_dtype)
        decayed = ()
        for i in tl.static_range(num_parts(V)):
            decayed += (acc[i] * decay[:, None],)
        acc = add_product(decayed, weights_LS.to(dtype).to(dot_dtype), values, 0, num_parts(V))
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    q_ptr,  # [T, H, N+R]
    kv_ptr,  # [T', h, N+V]
    rope_ptr,  # [T', R]
    out_ptr,  # [T, H, V] contiguous
    lse_ptr,  # [T, H] float32, contiguous
    starts_ptr,  # [sequences] int32 or None
    lengths_ptr,  # [sequences] int32 or None
    cu_q_ptr,  # [sequences + 1] int32 or None
    cu_k_ptr,  # [sequences + 1] int32 or None
    L,  # queries and keys of a padded sequence
    S,
    H,
    first_head,
    num_heads,  # h
    num_tiles,  # tiles of BLOCK_L queries of the longest sequence
    q_stride,  # of one token, in elements; kv_ptr and rope_ptr likewise
    q_head_stride,
    kv_stride,
    rope_stride,
    scale,  # float32, positive
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if UPCAST else dtype
    # A mask costs registers: with half the keys 128x128 does not spill on sm90.
    BLOCK_TAIL: tl.constexpr = BLOCK_S // 2 if BLOCK_S >= 64 else BLOCK_S
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles  # the longest causal rows first
    head = (program // num_tiles) % num_heads
    sequence = program // num_tiles // num_heads
    q_begin, q_count, k_begin, k_count = sequence_span(
        sequence, L, S, starts_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr
    )
    l_begin = tile * BLOCK_L
    if l_begin >= q_count:
        return

    limit_L, whole, end = visible_limits(l_begin, q_count, k_count, CAUSAL, BLOCK_L, BLOCK_S)
    q_base = q_ptr + (q_begin + l_begin) * q_stride
    q_base += tl.cast(first_head + head, tl.int64) * q_head_stride
    row = tl.arange(0, BLOCK_L)
    is_row_L = l_begin + row < q_count
    is_query_L = is_row_L & (limit_L > 0)  # a query that sees nothing may hold NaN
    q = load_parts(q_base, row * q_stride, is_query_L, N, True, dot_dtype)
    q += load_parts(q_base + N, row * q_stride, is_query_L, R, True, dot_dtype)
    kv_base = kv_ptr + k_begin * kv_stride + head * (N + V)
    rope_base = rope_ptr + k_begin * rope_stride

    log2_scale = scale * LOG2_E
    top = tl.full([BLOCK_L], float("-inf"), dtype=tl.float32)
    state = (zero_parts(BLOCK_L, V), top, tl.zeros([BLOCK_L], dtype=tl.float32))
    state = _attend(
        state, q, kv_base, rope_base, kv_stride, rope_stride, 0, whole, k_count, limit_L,
        log2_scale, N, R, V, BLOCK_S, False, dtype, dot_dtype,
    )  # fmt: skip
    acc, top, total = _attend(
        state, q, kv_base, rope_base, kv_stride, rope_stride, whole, end, k_count, limit_L,
        log2_scale, N, R, V, BLOCK_TAIL, True, dtype, dot_dtype,
    )  # fmt: skip

    safe_total = tl.where(total == 0.0, 1.0, total)
    out = ()
    for i in tl.static_range(num_parts(V)):
        out += (acc[i] / safe_total[:, None],)
    out_row = ((q_begin + l_begin) * H + first_head + head) * V
    store_parts(out_ptr + out_row, row * H * V, is_row_L, out, V)
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe_total)) * LN_2)
    tl.store(lse_ptr + (q_begin + l_begin + row) * H + first_head + head, lse, mask=is_row_L)


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
    B, L, H, _ = query.shape
    if scale <= 0:  # the kernel takes the largest score before it scales
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    operands = flatten(query, latent, k_rope, kv_b_weight, masking)
    shape = (B, L, H, operands.sizes.V)
    # Tokens outside every packed sequence are written by no program.
    is_packed = masking.cu_seqlens_q is not None
    new = query.new_zeros if is_packed else query.new_empty
    out = new(shape, dtype=out_dtype)
    lse = torch.full(shape[:3], float("-inf"), dtype=torch.float32, device=query.device)
    kv = query.new_empty(0)
    for heads in [slice(0, H)] if save_expanded else operands.head_groups():
        kv = expand(operands.latent, operands.weight[heads])
        operands.launch(prefill_kernel, "forward", heads, kv, out_ptr=out, lse_ptr=lse, scale=scale)
    return out, lse, kv.unflatten(0, latent.shape[:2]) if save_expanded else query.new_empty(0)
