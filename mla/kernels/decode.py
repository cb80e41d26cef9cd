"""Absorbed split-KV decode: attention from absorbed queries to cached rows of any layout and codec.

    scores = scale * (q_latent . latent + q_rope . k_rope),  out = softmax(scores) latent

Heads and query tokens together are the rows of a tile, so that a latent tile is loaded once and
serves as keys and as values of all of them. The keys of a row are split by its length alone and the
parts merged by log-sum-exp: a row's result has the same bits in any batch and on any pages.

Dims: B batch, L queries, H heads, S keys, X splits, C latent width, R rotated width, W columns of
one tile, T tiles, Z positions in one page, M page-table width.
Oracle: mla.reference.absorbed_attention. Source: arXiv:2405.04434 section 2.1; FlashDecoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla.kernels import launch
from mla.kernels.merge import merge_splits
from mla.kernels.rotate import rotate
from mla.kernels.tiles import load_rope, load_tile, local_count, split_size
from mla.view import CacheView

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_scores(scores, q, keys, log2_scale, IN_BRANCH: tl.constexpr):
    """``scores + q keys^T``, the product already scaled where scores are computed in a branch.

    Products that are summed by the matrix unit itself count as chained to the value product.
    """
    if IN_BRANCH:
        return scores + tl.dot(q, keys.T, input_precision="ieee") * log2_scale
    else:
        return tl.dot(q, keys.T, scores, input_precision="ieee")


@triton.jit(do_not_specialize=["num_splits", "M", "shard_index"])
def decode_kernel(
    q_latent_ptr,  # [B, L, H, C] contiguous
    q_rope_ptr,  # [B, L, H, R] contiguous
    rows_ptr,  # [P, Z, *] rows as elements (plain) or bytes
    table_ptr,  # [B, M] int32; unused for the dense layout
    lengths_ptr,  # [B] int32
    starts_ptr,  # [B] int32 or unused
    query_lengths_ptr,  # [B] int32 or unused
    out_ptr,  # [B, L, H, C] contiguous
    lse_ptr,  # [B, L, H] float32
    part_ptr,  # [B, X, L*H, C] float32, written where a row has several splits
    part_lse_ptr,  # [B, X, L*H] float32
    scale,  # float32
    num_splits,  # X of the workspace
    page_stride,  # in elements of rows_ptr
    slot_stride,
    M,
    shard_index,
    L,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    Z: tl.constexpr,  # positions in one page; 0: dense
    KIND: tl.constexpr,
    SCALES_AT: tl.constexpr,  # begin of the scales in a row, in elements of rows_ptr
    ROPE_AT: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_QUERY_LENGTHS: tl.constexpr,
    SHARDS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IN_BRANCH: tl.constexpr,  # see DecodeRow
    ONCE: tl.constexpr,  # see DecodePlan
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)  # int64: B*L*H*C can pass 2**31
    dtype: tl.constexpr = q_latent_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if UPCAST else dtype

    length = tl.load(lengths_ptr + b)
    local_length = local_count(length, shard_index, SHARDS, Z)
    size = split_size(local_length, SPLIT_KEYS, MAX_SPLITS, BLOCK_S)
    begin = split * size
    if (begin >= local_length) & (split > 0):
        return  # merge reads as many splits as the length has
    end = tl.minimum(begin + size, local_length)

    row = tile * BLOCK_H + tl.arange(0, BLOCK_H)  # row = query * H + head
    is_row = row < L * H
    count = tl.load(query_lengths_ptr + b) if HAS_QUERY_LENGTHS else L
    query = row // H
    last = length - count + query + 1  # keys up to the query's own position
    limit = local_count(last, shard_index, SHARDS, Z)
    limit = tl.where(is_row & (query < count), limit, 0)
    first = 0
    if HAS_STARTS:
        first = local_count(tl.load(starts_ptr + b), shard_index, SHARDS, Z)
        begin = tl.maximum(begin, first // BLOCK_S * BLOCK_S)

    q = ()
    acc = ()
    at = (b * L * H + row)[:, None]
    c = tl.arange(0, W)[None, :]
    for t in tl.static_range(T):
        column = t * W + c
        mask = is_row[:, None] & (column < C)
        q += (tl.load(q_latent_ptr + at * C + column, mask=mask, other=0.0).to(dot_dtype),)
        acc += (tl.zeros([BLOCK_H, W], dtype=tl.float32),)
    r = tl.arange(0, BLOCK_R)
    if R > 0:
        is_rope = is_row[:, None] & (r < R)[None, :]
        q_r = tl.load(q_rope_ptr + at * R + r[None, :], mask=is_rope, other=0.0).to(dot_dtype)

    top = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    s = tl.arange(0, BLOCK_S)
    # A tile inside one page needs one page id; otherwise each key has its own.
    IS_WHOLE: tl.constexpr = Z % BLOCK_S == 0
    of_key = 0 if IS_WHOLE else s
    table = table_ptr + b * M
    page = 0
    if Z > 0:
        page = tl.load(table + (begin + of_key) // Z, mask=begin + of_key < end, other=0)
    log2_scale = scale * LOG2_E
    weight = tl.zeros([BLOCK_H, BLOCK_S], dtype=dot_dtype)
    alpha = tl.zeros([BLOCK_H], dtype=tl.float32)
    for block in tl.range(begin, end, BLOCK_S):
        slot = block + s
        is_stored = slot < end
        if HAS_STARTS:
            is_stored &= slot >= first
        if Z > 0:
            inside = block % Z + s if IS_WHOLE else slot % Z
            offset = tl.cast(page, tl.int64) * page_stride + inside.to(tl.int64) * slot_stride
            # Carried, not loaded when needed: a load that feeds the next load is not pipelined.
            following = block + BLOCK_S + of_key
            page = tl.load(table + following // Z, mask=following < end, other=0)
        else:
            offset = b * page_stride + slot.to(tl.int64) * slot_stride
        row_S = rows_ptr + offset
        values = ()
        for t in tl.static_range(T):
            values += (
                load_tile(row_S, is_stored, t, C, W, KIND, SCALES_AT, SCALE_BITS, ONCE, dot_dtype),
            )
        key = 0
        if R > 0:
            key = load_rope(
                row_S, is_stored, R, BLOCK_R, KIND, ROPE_AT, ROPE_BITS, SCALES_AT, SCALE_BITS, T,
                dot_dtype,
            )  # fmt: skip
        run = block < end if IN_BRANCH else True
        if run:
            scores = tl.zeros([BLOCK_H, BLOCK_S], dtype=tl.float32)
            if R > 0:
                scores = _add_scores(scores, q_r, key, log2_scale, IN_BRANCH)
            for t in tl.static_range(T):
                scores = _add_scores(scores, q[t], values[t], log2_scale, IN_BRANCH)
            if not IN_BRANCH:
                scores *= log2_scale
            is_seen = is_stored[None, :] & (slot[None, :] < limit[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: avoid inf - inf
            alpha = tl.exp2(top - base)
            p = tl.exp2(scores - base[:, None])
            total = total * alpha + tl.sum(p, axis=1)
            top = new_top
            weight = p.to(dtype).to(dot_dtype)
        updated = ()
        for t in tl.static_range(T):
            updated += (tl.dot(weight, values[t], acc[t] * alpha[:, None], input_precision="ieee"),)
        acc = updated

    safe = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe)) * LN_2)
    is_single = size >= local_length
    for t in tl.static_range(T):
        column = t * W + c
        mask = is_row[:, None] & (column < C)
        value = acc[t] / safe[:, None]
        if is_single:
            tl.store(out_ptr + at * C + column, value, mask=mask)
        else:
            place = ((b * num_splits + split) * (L * H) + row)[:, None]
            tl.store(part_ptr + place * C + column, value, mask=mask)
    if is_single:
        tl.store(lse_ptr + b * L * H + row, lse, mask=is_row)
    else:
        tl.store(part_lse_ptr + (b * num_splits + split) * (L * H) + row, lse, mask=is_row)


def decode(
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    scale: float,
    query_lengths: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel and the merge. Callers have already checked shapes; see `mla.ops`."""
    B, L, H, C = q_latent.shape
    kernel_dtype = torch.float32 if view.codec.rotation else out_dtype
    out = torch.empty(B, L, H, C, dtype=kernel_dtype, device=q_latent.device)
    lse = torch.empty(B, L, H, dtype=torch.float32, device=q_latent.device)
    if out.numel() == 0:
        return out.to(out_dtype), lse
    if view.codec.rotation:
        q_latent = rotate(q_latent, q_latent.dtype)
    q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
    plan = launch.decode_plan(
        launch.architecture(q_latent.device), L * H, C, view.R, q_latent.dtype, view.codec
    )
    X = plan.num_splits(view.max_length)
    rows_at_once = plan.batch_rows(X, L * H, C)
    shape = (min(B, rows_at_once), X, L * H)
    part = out.new_empty((*shape, C) if X > 1 else (0,), dtype=torch.float32)
    part_lse = lse.new_empty(shape if X > 1 else (0,))
    for b0 in range(0, B, rows_at_once):
        rows = slice(b0, b0 + rows_at_once)
        _launch(plan, q_latent, q_rope, view, scale, query_lengths, out, lse, part, part_lse, rows)
    return (rotate(out, out_dtype) if view.codec.rotation else out), lse


def _launch(
    plan: launch.DecodePlan,
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    scale: float,
    query_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    part: Tensor,
    part_lse: Tensor,
    rows: slice,
) -> None:
    """One grid over the batch rows that the workspace has room for."""
    _, L, H, C = q_latent.shape
    out_rows, lse_rows = out[rows], lse[rows]
    num_rows = out_rows.shape[0]
    X = part_lse.shape[1] if part_lse.numel() else 1
    lengths = view.lengths[rows]
    starts = None if view.starts is None else view.starts[rows]
    counts = None if query_lengths is None else query_lengths[rows]
    is_paged = view.page_table is not None
    table = lengths if view.page_table is None else view.page_table[rows]
    first_page = 0 if is_paged else rows.start
    launch.run(
        decode_kernel, (triton.cdiv(L * H, plan.BLOCK_H), X, num_rows), out.device,
        q_latent[rows], q_rope[rows],
        view.rows[first_page:], table, lengths,
        lengths if starts is None else starts,
        lengths if counts is None else counts,
        out_rows, lse_rows, part, part_lse,
        scale, X, view.rows.stride(0), view.rows.stride(1), table.stride(0), view.shard[0], L,
        H=H, C=C, R=view.R, **launch.view_constants(view), **plan.constants(view.R),
        HAS_STARTS=starts is not None, HAS_QUERY_LENGTHS=counts is not None,
        UPCAST=launch.upcast(q_latent),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if X > 1:
        merge_splits(
            part, part_lse, lengths, view, out_rows, lse_rows, plan.SPLIT_KEYS, plan.BLOCK_S
        )
