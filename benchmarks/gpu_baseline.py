"""The decode scheme that engines ship in Triton, as a baseline: 16 heads a block, two loads.

Each block takes 16 heads and one of a fixed number of splits; it loads a tile of latents as keys,
transposed, and once more as values, with 4 warps and page ids read where they are needed. So 128
heads read the cache eight times, and twice each. Written from the description of the scheme.

Dims: B batch, H heads, S keys, X splits, C latent width (a power of two), R rotated width, Z
positions in one page, M page-table width. Oracle: mla.reference.absorbed_attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla.kernels import launch
from mla.kernels.merge import merge
from mla.view import CacheView

NUM_SPLITS = 8
BLOCK_H, BLOCK_S = 16, 32


@triton.jit
def two_load_kernel(
    q_latent_ptr,  # [B, H, C] contiguous
    q_rope_ptr,  # [B, H, R] contiguous
    rows_ptr,  # [P, Z, C+R]
    table_ptr,  # [B, M] int32
    lengths_ptr,  # [B] int32
    part_ptr,  # [X, B, H, C] float32
    part_lse_ptr,  # [X, B, H] float32
    scale,
    page_stride,
    slot_stride,
    M,
    B,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    Z: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(2)
    dtype: tl.constexpr = q_latent_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if UPCAST else dtype
    length = tl.load(lengths_ptr + b)
    size = tl.cdiv(tl.cdiv(length, NUM_SPLITS), BLOCK_S) * BLOCK_S
    begin = split * size
    end = tl.minimum(begin + size, length)

    is_head = head < H
    c, r = tl.arange(0, C), tl.arange(0, BLOCK_R)
    at = (b * H + head)[:, None]
    is_rope = is_head[:, None] & (r < R)[None, :]
    q = tl.load(q_latent_ptr + at * C + c[None, :], mask=is_head[:, None], other=0.0)
    q_r = tl.load(q_rope_ptr + at * R + r[None, :], mask=is_rope, other=0.0)
    q, q_r = q.to(dot_dtype), q_r.to(dot_dtype)
    top = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, C], dtype=tl.float32)
    for block in range(begin, end, BLOCK_S):
        slot = block + tl.arange(0, BLOCK_S)
        is_key = slot < end
        page = tl.load(table_ptr + b * M + slot // Z, mask=is_key, other=0).to(tl.int64)
        offset = page * page_stride + (slot % Z).to(tl.int64) * slot_stride
        keys = tl.load(rows_ptr + offset[None, :] + c[:, None], mask=is_key[None, :], other=0.0)
        scores = tl.dot(q, keys.to(dot_dtype), input_precision="ieee")
        rope_mask = is_key[None, :] & (r < R)[:, None]
        rope = tl.load(rows_ptr + offset[None, :] + C + r[:, None], mask=rope_mask, other=0.0)
        scores = tl.dot(q_r, rope.to(dot_dtype), scores, input_precision="ieee")
        scores = tl.where(is_key[None, :], scores * (scale * 1.4426950408889634), float("-inf"))
        values = tl.load(rows_ptr + offset[:, None] + c[None, :], mask=is_key[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        alpha = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        weight = p.to(dtype).to(dot_dtype)
        acc = tl.dot(weight, values.to(dot_dtype), acc * alpha[:, None], input_precision="ieee")
        total = total * alpha + tl.sum(p, axis=1)
        top = new_top

    safe = tl.where(total == 0.0, 1.0, total)
    place = (split * B + b) * H + head
    tl.store(part_ptr + place[:, None] * C + c[None, :], acc / safe[:, None], mask=is_head[:, None])
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe)) * 0.6931471805599453)
    tl.store(part_lse_ptr + place, lse, mask=is_head)


def two_load_decode(
    q_latent: Tensor, q_rope: Tensor, view: CacheView, scale: float, num_splits: int = NUM_SPLITS
) -> Tensor:
    """``[B, 1, H, C]`` for plain paged rows and one query of each row."""
    B, _, H, C = q_latent.shape
    assert view.page_table is not None
    part = q_latent.new_empty(num_splits, B, H, C, dtype=torch.float32)
    part_lse = q_latent.new_empty(num_splits, B, H, dtype=torch.float32)
    two_load_kernel[(B, triton.cdiv(H, BLOCK_H), num_splits)](
        q_latent, q_rope, view.rows, view.page_table, view.lengths, part, part_lse,
        scale, view.rows.stride(0), view.rows.stride(1), view.page_table.stride(0), B,
        H=H, C=C, R=view.R, Z=view.rows.shape[1], NUM_SPLITS=num_splits,
        BLOCK_H=BLOCK_H, BLOCK_S=BLOCK_S, BLOCK_R=max(16, triton.next_power_of_2(view.R)),
        UPCAST=launch.upcast(q_latent), num_warps=4, num_stages=2,
    )  # fmt: skip
    out, _ = merge(part, part_lse)
    return out.to(q_latent.dtype).unsqueeze(1)
