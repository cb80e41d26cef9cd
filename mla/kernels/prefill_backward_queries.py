"""Gradient of queries: a program owns a tile of queries and walks over the keys.

    weights_LS = exp(scale * query_L . key_S - lse_L)
    d_query_L  = scale * sum_S weights_LS * (d_out_L . value_S - delta_L) key_S

Dims: T query tokens, T' key tokens, L queries, S keys, H heads, h heads of one group, N unrotated
width, R rotated width, V value width.
Oracle: autograd through mla.reference.expanded_attention. Source: FlashAttention-2,
arXiv:2307.08691, section 3.1.2.
"""

import triton
import triton.language as tl

from mla.kernels.prefill_tiles import (
    LOG2_E,
    VARYING,
    add_product,
    dot_rows,
    load_parts,
    num_parts,
    scaled_parts,
    sequence_span,
    store_parts,
    visible_limits,
    zero_parts,
)


@triton.jit
def _walk_keys(
    d_q,
    q,
    d_out,
    log2_lse_L,
    delta_L,
    limit_L,
    kv_ptr,
    rope_ptr,
    kv_stride,
    rope_stride,
    begin,
    end,
    k_count,
    log2_scale,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
    dot_dtype: tl.constexpr,
):
    """Add what keys ``begin .. end`` give; without MASKED all queries of the tile see them."""
    s = tl.arange(0, BLOCK_S)
    for first in tl.range(begin, end, BLOCK_S):
        is_key_S = first + s < k_count
        kv_row = kv_ptr + tl.cast(first, tl.int64) * kv_stride
        rope_row = rope_ptr + tl.cast(first, tl.int64) * rope_stride
        keys = load_parts(kv_row, s * kv_stride, is_key_S, N, MASKED, dot_dtype)
        keys += load_parts(rope_row, s * rope_stride, is_key_S, R, MASKED, dot_dtype)
        values = load_parts(kv_row + N, s * kv_stride, is_key_S, V, MASKED, dot_dtype)
        scores_LS = dot_rows(q, keys, num_parts(N) + num_parts(R))
        weights_LS = tl.exp2(scores_LS * log2_scale - log2_lse_L[:, None])
        if MASKED:
            is_seen_LS = (first + s)[None, :] < limit_L[:, None]
            weights_LS = tl.where(is_seen_LS, weights_LS, 0.0)
        d_weights_LS = dot_rows(d_out, values, num_parts(V))
        d_scores_LS = (weights_LS * (d_weights_LS - delta_L[:, None])).to(dtype).to(dot_dtype)
        d_q = add_product(d_q, d_scores_LS, keys, 0, num_parts(N) + num_parts(R))
    return d_q


@triton.jit(do_not_specialize=[*VARYING, "T"])
def prefill_backward_queries_kernel(
    q_ptr,  # [T, H, N+R]
    kv_ptr,  # [T', h, N+V]
    rope_ptr,  # [T', R]
    d_out_ptr,  # [T, H, V] contiguous
    log2_lse_ptr,  # [H, T] float32
    delta_ptr,  # [H, T] float32
    d_q_ptr,  # [T, H, N+R] contiguous
    starts_ptr,  # [sequences] int32 or None
    lengths_ptr,  # [sequences] int32 or None
    cu_q_ptr,  # [sequences + 1] int32 or None
    cu_k_ptr,  # [sequences + 1] int32 or None
    L,  # queries and keys of a padded sequence
    S,
    T,
    H,
    first_head,
    num_heads,  # h
    num_tiles,  # tiles of BLOCK_L queries of the longest sequence
    q_stride,  # of one token, in elements; kv_ptr and rope_ptr likewise
    q_head_stride,
    kv_stride,
    rope_stride,
    scale,  # float32
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
    BLOCK_TAIL: tl.constexpr = BLOCK_S // 2 if BLOCK_S >= 64 else BLOCK_S  # as in prefill.py
    program = tl.program_id(0)
    l_begin = (num_tiles - 1 - program % num_tiles) * BLOCK_L  # the longest causal rows first
    head = (program // num_tiles) % num_heads
    sequence = program // num_tiles // num_heads
    q_begin, q_count, k_begin, k_count = sequence_span(
        sequence, L, S, starts_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr
    )
    if l_begin >= q_count:
        return

    row = tl.arange(0, BLOCK_L)
    limit_L, whole, end = visible_limits(l_begin, q_count, k_count, CAUSAL, BLOCK_L, BLOCK_S)
    is_row_L = l_begin + row < q_count
    is_query_L = is_row_L & (limit_L > 0)
    full_head = tl.cast(first_head + head, tl.int64)
    q_row = q_begin + l_begin
    q_base = q_ptr + q_row * q_stride + full_head * q_head_stride
    q = load_parts(q_base, row * q_stride, is_query_L, N, True, dot_dtype)
    q += load_parts(q_base + N, row * q_stride, is_query_L, R, True, dot_dtype)
    d_out_row = d_out_ptr + (q_row * H + full_head) * V
    d_out = load_parts(d_out_row, row * H * V, is_query_L, V, True, dot_dtype)
    place = full_head * T + q_row + row
    log2_lse = tl.load(log2_lse_ptr + place, mask=is_query_L, other=float("inf"))
    delta = tl.load(delta_ptr + place, mask=is_query_L, other=0.0)

    kv_base = kv_ptr + k_begin * kv_stride + head * (N + V)
    rope_base = rope_ptr + k_begin * rope_stride
    d_q = zero_parts(BLOCK_L, N) + zero_parts(BLOCK_L, R)
    d_q = _walk_keys(
        d_q, q, d_out, log2_lse, delta, limit_L, kv_base, rope_base, kv_stride, rope_stride,
        0, whole, k_count, scale * LOG2_E, N, R, V, BLOCK_S, False, dtype, dot_dtype,
    )  # fmt: skip
    d_q = _walk_keys(
        d_q, q, d_out, log2_lse, delta, limit_L, kv_base, rope_base, kv_stride, rope_stride,
        whole, end, k_count, scale * LOG2_E, N, R, V, BLOCK_TAIL, True, dtype, dot_dtype,
    )  # fmt: skip

    d_nope, d_rope = scaled_parts(d_q, scale, N, R)
    d_q_row = d_q_ptr + (q_row * H + full_head) * (N + R)
    store_parts(d_q_row, row * H * (N + R), is_row_L, d_nope, N)
    store_parts(d_q_row + N, row * H * (N + R), is_row_L, d_rope, R)
