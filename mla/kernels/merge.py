"""Merge split-KV partial results into one, weighting each split by its log-sum-exp.

    lse = log sum_X exp(lse_X),  out = sum_X exp(lse_X - lse) out_X

Dims: B batch, X key splits, Y rows of a split (queries x heads), C latent width.
Oracle: mla.reference.merge_partials. Source: online softmax, arXiv:1805.02867.
"""

import triton
import triton.language as tl
from torch import Tensor

from mla.kernels import launch
from mla.kernels.tiles import local_count, split_size
from mla.view import CacheView

BLOCK_LSE, BLOCK_X = 128, 32  # parts read at once: loads of one step overlap, steps wait


@triton.jit(do_not_specialize=["num_splits", "num_rows", "shard_index"])
def merge_kernel(
    part_ptr,  # [B, X, Y, C] float32, contiguous; unwritten beyond a row's own splits
    lse_part_ptr,  # [B, X, Y] float32; -inf marks a split that saw no key
    lengths_ptr,  # [B] int32; unused with ALL_PARTS
    out_ptr,  # [B, Y, C]
    lse_ptr,  # [B, Y]
    num_splits,  # X of the workspace
    num_rows,  # Y
    shard_index,
    C: tl.constexpr,
    Z: tl.constexpr,  # positions in one page
    ALL_PARTS: tl.constexpr,  # every part counts; otherwise those that the length gives
    SHARDS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LSE: tl.constexpr,  # parts of one step: constants, as sums depend on them
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)  # int64: B*X*Y*C can pass 2**31
    count = num_splits
    if not ALL_PARTS:
        length = local_count(tl.load(lengths_ptr + b), shard_index, SHARDS, Z)
        size = split_size(length, SPLIT_KEYS, MAX_SPLITS, BLOCK_S)
        count = (length + size - 1) // size
        if count <= 1:
            return  # decode wrote the result itself
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = float("-inf")
    for begin in range(0, count, BLOCK_LSE):
        x = begin + tl.arange(0, BLOCK_LSE)
        place_X = (b * num_splits + x) * num_rows + y
        lse_X = tl.load(lse_part_ptr + place_X, mask=x < count, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse_X, axis=0))
    top = tl.where(top == float("-inf"), 0.0, top)  # every split empty: avoid inf - inf

    total = 0.0
    out_C = tl.zeros([BLOCK_C], dtype=tl.float32)
    for begin in range(0, count, BLOCK_X):
        x = begin + tl.arange(0, BLOCK_X)
        place_X = (b * num_splits + x) * num_rows + y
        lse_X = tl.load(lse_part_ptr + place_X, mask=x < count, other=float("-inf"))
        weight_X = tl.exp(lse_X - top)
        total += tl.sum(weight_X, axis=0)
        # Skip empty splits instead of weighting them by 0: their memory may hold NaN.
        mask = (weight_X > 0.0)[:, None] & (c < C)[None, :]
        part_XC = tl.load(part_ptr + place_X[:, None] * C + c[None, :], mask=mask, other=0.0)
        out_C += tl.sum(weight_X[:, None] * part_XC, axis=0)
    safe_total = tl.where(total == 0.0, 1.0, total)
    out_C = out_C / safe_total

    tl.store(out_ptr + (b * num_rows + y) * C + c, out_C, mask=c < C)
    if tl.program_id(1) == 0:
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log(safe_total))
        tl.store(lse_ptr + b * num_rows + y, lse)


def merge_splits(
    part: Tensor,  # [B, X, Y, C]
    part_lse: Tensor,
    lengths: Tensor,
    view: CacheView,
    out: Tensor,
    lse: Tensor,
    SPLIT_KEYS: int,
    BLOCK_S: int,
) -> None:
    """Merge the splits that `mla.kernels.decode` left behind, into ``out`` and ``lse``."""
    _, X, Y, C = part.shape
    BLOCK_C = min(128, triton.next_power_of_2(C))
    launch.run(
        merge_kernel, (Y, triton.cdiv(C, BLOCK_C), out.shape[0]), out.device,
        part, part_lse, lengths, out, lse, X, Y, view.shard[0],
        C=C, Z=launch.page_size(view), ALL_PARTS=False, SHARDS=view.shard[1],
        SPLIT_KEYS=SPLIT_KEYS, MAX_SPLITS=launch.MAX_SPLITS, BLOCK_S=BLOCK_S,
        BLOCK_LSE=BLOCK_LSE, BLOCK_X=BLOCK_X, BLOCK_C=BLOCK_C,
    )  # fmt: skip


def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``out [X, .., W]`` by ``lse [X, ..]``. Callers have already checked shapes."""
    merged, merged_lse = out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])
    if merged.numel() == 0:
        return merged, merged_lse
    X, Y, C = out.shape[0], merged_lse.numel(), out.shape[-1]
    BLOCK_C = min(128, triton.next_power_of_2(C))
    launch.run(
        merge_kernel, (Y, triton.cdiv(C, BLOCK_C), 1), out.device,
        out.contiguous(), lse.contiguous(), lse, merged, merged_lse, X, Y, 0,
        C=C, Z=0, ALL_PARTS=True, SHARDS=1, SPLIT_KEYS=1, MAX_SPLITS=1, BLOCK_S=1,
        BLOCK_LSE=BLOCK_LSE, BLOCK_X=BLOCK_X, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return merged, merged_lse
