"""How kernels are launched: (architecture, sizes) -> tiles, warps, stages, as tables with reasons.

Nothing is tuned at run time, because results must not depend on timing. Every promised row is
compiled for its target and checked for shared memory and spills; see `mla.kernels.variants`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mla.checks import UnsupportedError
from mla.codec import Codec, PlainCodec
from mla.view import CacheView

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {
    "sm80": 166_912,
    "sm86": 101_376,
    "sm90": 232_448,
    "sm100": 232_448,
    "sm120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
    "interpreter": 1 << 30,
}
_CUDA = {(8, 0): "sm80", (8, 6): "sm86", (8, 9): "sm86", (9, 0): "sm90", (10, 0): "sm100"}

MAX_SPLITS = 128  # one split for each multiprocessor of an H100 at batch 1
WORKSPACE_BYTES = 1 << 28  # partial results of one launch; larger batches take several launches


@dataclass(frozen=True)
class DecodeRow:
    """Tile of the decode kernel for up to ``most_rows`` rows of queries x heads."""

    most_rows: int
    BLOCK_H: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    SPLIT_KEYS: int
    reason: str


# Small tiles are bound by memory: keys are cut finely so that few sequences fill the device.
# Large ones are bound by arithmetic: longer splits write fewer partial results.
DECODE: dict[str, tuple[DecodeRow, ...]] = {
    "sm80": (
        DecodeRow(16, 16, 64, 8, 2, 512, "memory-bound; two buffers of 64 keys fit"),
        DecodeRow(1 << 30, 32, 32, 8, 2, 1024, "64 rows spill on sm80, 32x32 does not"),
    ),
    "sm86": (
        DecodeRow(1 << 30, 16, 32, 4, 2, 512, "99 KiB of shared memory: two buffers of 32 keys"),
    ),
    "sm90": (
        DecodeRow(16, 16, 64, 8, 2, 512, "memory-bound; 16 rows take mma.sync"),
        DecodeRow(32, 32, 32, 8, 2, 512, "between the two: half of a 64-row tile would be empty"),
        DecodeRow(1 << 30, 64, 32, 8, 2, 1024, "64 rows reach wgmma; 64 coded keys would spill"),
    ),
    "sm100": (
        DecodeRow(16, 16, 64, 8, 2, 512, "memory-bound"),
        DecodeRow(32, 32, 32, 8, 2, 512, "between the two"),
        DecodeRow(1 << 30, 64, 32, 8, 1, 1024, "tcgen05; a second buffer does not fit"),
    ),
    "sm120": (DecodeRow(1 << 30, 16, 32, 4, 2, 512, "99 KiB of shared memory"),),
    "gfx942": (DecodeRow(1 << 30, 16, 32, 4, 1, 512, "64 KiB of shared memory: one buffer"),),
    "gfx950": (DecodeRow(1 << 30, 16, 32, 4, 2, 512, "160 KiB of shared memory"),),
    "interpreter": (DecodeRow(1 << 30, 16, 16, 1, 1, 32, "small, so that small tests split"),),
}
KINDS = {"plain": 0, "fp8": 1, "int8": 2, "int4": 3}  # as in tiles.py


class DecodePlan(NamedTuple):
    """Constants of one decode launch."""

    BLOCK_H: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    SPLIT_KEYS: int
    W: int  # columns of one tile
    T: int  # tiles of a row
    kind: int

    def num_splits(self, max_length: int) -> int:
        """Splits of a row of ``max_length`` keys, as `mla.kernels.tiles.split_size` counts them."""
        size = max(self.SPLIT_KEYS, triton.cdiv(max_length, MAX_SPLITS))
        return max(1, triton.cdiv(max_length, triton.cdiv(size, self.BLOCK_S) * self.BLOCK_S))

    def batch_rows(self, num_splits: int, num_rows: int, C: int) -> int:
        """Batch rows of one launch whose partial results fit into `WORKSPACE_BYTES`."""
        return max(1, WORKSPACE_BYTES // (4 * num_splits * num_rows * C))


class Storage(NamedTuple):
    """A view's rows as the three kinds of elements that a kernel reads from them."""

    values: Tensor
    scales: Tensor
    rope: Tensor
    scales_at: int  # in elements of scales
    rope_at: int  # in elements of rope
    rope_scale_idx: int
    rope_bits: int


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def upcast(tensor: Tensor) -> bool:
    """Whether dot operands must be float32: the interpreter misreads the bits of bfloat16."""
    return is_interpreting() and tensor.dtype == torch.bfloat16


def architecture(device: torch.device) -> str:
    """The table row's key of a device.

    Raises:
        UnsupportedError: no table has rows for this device.
    """
    if is_interpreting():
        return "interpreter"
    if device.type != "cuda":
        raise UnsupportedError(
            f"impl='triton': device has type {device.type}, expected cuda, or TRITON_INTERPRET=1"
        )
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        capability = torch.cuda.get_device_capability(index)
        name = _CUDA.get(capability, "sm120" if capability[0] == 12 else f"sm{capability}")
    if name not in DECODE:
        raise UnsupportedError(
            f"impl='triton': device has architecture {name}, expected one of "
            f"{[key for key in DECODE if key != 'interpreter']}"
        )
    return name


@lru_cache(maxsize=256)
def decode_plan(
    architecture: str, num_rows: int, C: int, R: int, dtype: torch.dtype, codec: Codec
) -> DecodePlan:
    """Constants for ``num_rows`` rows of queries x heads over rows of C + R numbers."""
    row = next(row for row in DECODE[architecture] if num_rows <= row.most_rows)
    if isinstance(codec, PlainCodec):
        W = min(128, max(16, triton.next_power_of_2(C)))
        T = triton.cdiv(C, W)
    else:
        W = codec.group
        T = triton.cdiv(C, W)
    BLOCK_S, stages = row.BLOCK_S, row.num_stages
    width = T * W + max(16, triton.next_power_of_2(R))
    # Compile reports: stages - 1 buffers of keys and one of queries lie in shared memory.
    buffers = max(1, stages - 1)
    row_bytes = width * dtype.itemsize
    while (buffers * BLOCK_S + row.BLOCK_H) * row_bytes > SHARED_LIMIT[architecture]:
        if BLOCK_S == 16:
            break
        BLOCK_S //= 2  # rows wider than those of the table
    return DecodePlan(
        row.BLOCK_H,
        BLOCK_S,
        row.num_warps,
        stages,
        row.SPLIT_KEYS,
        W,
        T,
        KINDS[codec.kind],
    )


def row_storage(view: CacheView) -> Storage:
    """The rows of ``view`` as values, scales and rope elements; nothing is copied."""
    rows, codec = view.rows, view.codec
    if isinstance(codec, PlainCodec):
        return Storage(rows, rows, rows, 0, view.C, 0, 16)
    at = codec.sections(view.C, view.R)
    rope_dtype = torch.uint8 if codec.rope_bits == 8 else torch.bfloat16
    return Storage(
        rows,
        rows.view(codec.scale_dtype),
        rows.view(rope_dtype),
        at.scales_at // codec.scale_dtype.itemsize,
        at.rope_at // rope_dtype.itemsize,
        at.num_groups,
        codec.rope_bits,
    )
