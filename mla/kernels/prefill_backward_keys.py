"""Gradients of keys and values: a program owns a tile of keys and walks over the queries.

    weights_SL = exp(scale * key_S . query_L - lse_L),  d_value_S = sum_L weights_SL d_out_L
    d_key_S    = scale * sum_L weights_SL * (value_S . d_out_L - delta_L) query_L

Queries outside a sequence need no mask of their own: their lse is read as infinity, so they weigh
0. The rotated key's gradient is written for each head: adding heads here would need atomics.

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
    zero_parts,
)


@triton.jit
def _walk_queries(
    grads,  # (keys' accumulators, values' accumulators)
    keys,
    values,
    key_S,
    q_ptr,
    d_out_ptr,
    log2_lse_ptr,
    delta_ptr,
    q_stride,
    d_out_stride,
    begin,
    end,
    q_first,
    q_count,
    past,
    log2_scale,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
    dot_dtype: tl.constexpr,
):
    """Add what queries ``begin .. end`` give; without MASKED they see all keys of the tile."""
    d_keys, d_values = grads
    row = tl.arange(0, BLOCK_L)
    for first in tl.range(begin, end, BLOCK_L):
        l = first + row  # noqa: E741
        is_query_L = (l >= q_first) & (l < q_count)
        q_row = q_ptr + tl.cast(first, tl.int64) * q_stride
        d_out_row = d_out_ptr + tl.cast(first, tl.int64) * d_out_stride
        q = load_parts(q_row, row * q_stride, is_query_L, N, True, dot_dtype)
        q += load_parts(q_row + N, row * q_stride, is_query_L, R, True, dot_dtype)
        log2_lse = tl.load(log2_lse_ptr + l, mask=is_query_L, other=float("inf"))
        scores_SL = dot_rows(keys, q, num_parts(N) + num_parts(R))
        weights_SL = tl.exp2(scores_SL * log2_scale - log2_lse[None, :])
        if MASKED:
            weights_SL = tl.where(key_S[:, None] <= (past + l)[None, :], weights_SL, 0.0)
        d_out = load_parts(d_out_row, row * d_out_stride, is_query_L, V, True, dot_dtype)
        delta = tl.load(delta_ptr + l, mask=is_query_L, other=0.0)
        used_SL = weights_SL.to(dtype).to(dot_dtype)
        d_values = add_product(d_values, used_SL, d_out, 0, num_parts(V))
        d_weights_SL = dot_rows(values, d_out, num_parts(V))
        d_scores_SL = (weights_SL * (d_weights_SL - delta[None, :])).to(dtype).to(dot_dtype)
        d_keys = add_product(d_keys, d_scores_SL, q, 0, num_parts(N) + num_parts(R))
    return d_keys, d_values


@triton.jit(do_not_specialize=[*VARYING, "T"])
def prefill_backward_keys_kernel(
    q_ptr,  # [T, H, N+R]
    kv_ptr,  # [T', h, N+V]
    rope_ptr,  # [T', R]
    d_out_ptr,  # [T, H, V] contiguous
    log2_lse_ptr,  # [H, T] float32
    delta_ptr,  # [H, T] float32
    d_kv_ptr,  # [T', h, N+V] contiguous
    d_rope_ptr,  # [T', h, R] float32, contiguous
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
    num_tiles,  # tiles of BLOCK_S keys of the longest sequence
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
    program = tl.program_id(0)
    s_begin = (program % num_tiles) * BLOCK_S  # the first keys have the most causal queries
    head = (program // num_tiles) % num_heads
    sequence = program // num_tiles // num_heads
    q_begin, q_count, k_begin, k_count = sequence_span(
        sequence, L, S, starts_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr
    )
    if s_begin >= k_count:
        return

    past = k_count - q_count
    q_first = 0
    begin = 0
    whole = 0  # from here on queries see the whole tile
    if CAUSAL:
        q_first = tl.maximum(-past, 0)
        begin = tl.maximum(s_begin - past, 0) // BLOCK_L * BLOCK_L
        whole = tl.maximum(s_begin + BLOCK_S - 1 - past, 0)
        whole = tl.minimum((whole + BLOCK_L - 1) // BLOCK_L * BLOCK_L, q_count)

    row = tl.arange(0, BLOCK_S)
    key_S = s_begin + row
    is_key_S = key_S < k_count
    k_row = k_begin + s_begin
    kv_row = kv_ptr + k_row * kv_stride + head * (N + V)
    keys = load_parts(kv_row, row * kv_stride, is_key_S, N, True, dot_dtype)
    rope_row = rope_ptr + k_row * rope_stride
    keys += load_parts(rope_row, row * rope_stride, is_key_S, R, True, dot_dtype)
    values = load_parts(kv_row + N, row * kv_stride, is_key_S, V, True, dot_dtype)

    full_head = tl.cast(first_head + head, tl.int64)
    q_base = q_ptr + q_begin * q_stride + full_head * q_head_stride
    d_out_base = d_out_ptr + (q_begin * H + full_head) * V
    log2_lse_base = log2_lse_ptr + full_head * T + q_begin
    delta_base = delta_ptr + full_head * T + q_begin
    grads = (zero_parts(BLOCK_S, N) + zero_parts(BLOCK_S, R), zero_parts(BLOCK_S, V))
    if CAUSAL:
        grads = _walk_queries(
            grads, keys, values, key_S, q_base, d_out_base, log2_lse_base, delta_base,
            q_stride, H * V, begin, whole, q_first, q_count, past, scale * LOG2_E,
            N, R, V, BLOCK_L, True, dtype, dot_dtype,
        )  # fmt: skip
    d_keys, d_values = _walk_queries(
        grads, keys, values, key_S, q_base, d_out_base, log2_lse_base, delta_base,
        q_stride, H * V, whole, q_count, q_first, q_count, past, scale * LOG2_E,
        N, R, V, BLOCK_L, False, dtype, dot_dtype,
    )  # fmt: skip

    d_nope, d_rope = scaled_parts(d_keys, scale, N, R)
    d_row = k_row * num_heads + head
    offset_S = row * num_heads
    d_kv_row = d_kv_ptr + d_row * (N + V)
    store_parts(d_kv_row, offset_S * (N + V), is_key_S, d_nope, N)
    store_parts(d_kv_row + N, offset_S * (N + V), is_key_S, d_values, V)
    store_parts(d_rope_ptr + d_row * R, offset_S * R, is_key_S, d_rope, R)
