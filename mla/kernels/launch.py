"""How kernels are launched: (architecture, sizes) -> tiles, warps, stages, as tables with reasons.

Nothing is tuned at run time, because results must not depend on timing, and nothing is compiled
again when a length, a batch or a page table changes: kernels do not specialise on them. Every
promised row is compiled for its target and checked for shared memory and spills; see
`mla.kernels.variants`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

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

Operands = Literal["plain", "coded", "float32"]
ALL = 1 << 30


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
    W: int = 128  # columns of one dot product; coded rows: those of a scale group
    most_columns: int = ALL  # of all tiles of a row together
    # Scores in a branch that is always taken: Triton gives a product that feeds another one all
    # warps along the rows, so that two warp groups would compute the same 64 rows of scores.
    IN_BRANCH: bool = False


# Small tiles are bound by memory: keys are cut finely so that few sequences fill the device.
# Large ones are bound by arithmetic: longer splits write fewer partial results.
# Stages: with 2 the next keys are fetched when a tile is done, with 3 while it is computed.
_SMALL = DecodeRow(16, 16, 32, 4, 3, 512, "memory-bound; two blocks share a multiprocessor")
_FLOAT32 = DecodeRow(ALL, 16, 32, 8, 2, 512, "no matrix unit in float32: 64 keys spill")
_FLOAT32_SMALL = DecodeRow(ALL, 16, 16, 8, 2, 512, "no matrix unit; 99 KiB of shared memory")
_MIDDLE = DecodeRow(ALL, 32, 64, 8, 3, 1024, "as many keys as 8 warps take without sharing any")
_AMD = DecodeRow(ALL, 32, 32, 4, 2, 1024, "64 rows spill")

DECODE: dict[str, dict[Operands, tuple[DecodeRow, ...]]] = {
    "sm80": {
        "plain": (
            _SMALL,
            DecodeRow(32, 32, 64, 8, 2, 1024, "a third stage does not fit"),
            DecodeRow(ALL, 64, 32, 8, 3, 1024, "half the reads of 32 rows; 64 keys spill"),
        ),
        "coded": (_SMALL, DecodeRow(ALL, 32, 64, 8, 2, 1024, "64 rows spill")),
        "float32": (_FLOAT32,),
    },
    "sm86": {
        "plain": (_SMALL, DecodeRow(ALL, 32, 32, 8, 2, 1024, "99 KiB of shared memory")),
        "float32": (_FLOAT32_SMALL,),
    },
    "sm90": {
        "plain": (
            _SMALL,
            replace(_MIDDLE, most_rows=32),
            DecodeRow(
                ALL, 64, 32, 8, 3, 1024, "wgmma; 64 keys leave no room to fetch ahead",
                W=256, IN_BRANCH=True,
            ),
        ),
        "coded": (
            _SMALL,
            replace(_MIDDLE, most_rows=32),
            DecodeRow(ALL, 64, 32, 8, 3, 1024, "wgmma; 64 keys spill", IN_BRANCH=True),
        ),
        "float32": (_FLOAT32,),
    },
    "sm100": {
        "plain": (
            _SMALL,
            replace(_MIDDLE, most_rows=32),
            DecodeRow(
                ALL, 64, 32, 8, 2, 1024, "tcgen05; narrower dots overflow tensor memory",
                W=512, most_columns=512,
            ),
            _MIDDLE,
        ),
        "coded": (_SMALL, _MIDDLE),  # 64 rows overflow tensor memory
        "float32": (_FLOAT32,),
    },
    "sm120": {
        "plain": (_SMALL, DecodeRow(ALL, 32, 32, 8, 2, 1024, "99 KiB of shared memory")),
        "float32": (_FLOAT32_SMALL,),
    },
    "gfx942": {
        "plain": (
            DecodeRow(16, 16, 32, 4, 1, 512, "fetching ahead spills"),
            replace(_AMD, num_stages=1, reason="fetching ahead spills, and so do 64 rows"),
        ),
        "coded": (DecodeRow(16, 16, 32, 4, 2, 512, "memory-bound"), _AMD),
        "float32": (DecodeRow(ALL, 16, 16, 4, 1, 512, "32 keys spill"),),
    },
    "gfx950": {
        "plain": (DecodeRow(16, 16, 32, 4, 2, 512, "memory-bound"), _AMD),
        "float32": (DecodeRow(ALL, 16, 16, 4, 1, 512, "32 keys spill"),),
    },
    "interpreter": {
        "plain": (
            DecodeRow(16, 16, 16, 1, 1, 32, "small, so that small tests split"),
            DecodeRow(ALL, 16, 16, 1, 1, 32, "the same in a branch", IN_BRANCH=True),
        ),
    },
}  # fmt: skip
DECODE_MMA = {("sm90", 64): "wgmma", ("sm100", 64): "tcgen05.mma"}  # by BLOCK_H; promised
KINDS = {"plain": 0, "fp8": 1, "int8": 2, "int4": 3}  # as in tiles.py


class DecodePlan(NamedTuple):
    """Constants of one decode launch."""

    BLOCK_H: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    SPLIT_KEYS: int
    IN_BRANCH: bool
    W: int  # columns of one tile
    T: int  # tiles of a row
    ONCE: int = 0  # of them, converted once for both products at the price of shared memory

    def constants(self, R: int) -> dict[str, int]:
        """Constants of the kernel that the plan decides."""
        return {
            "W": self.W,
            "T": self.T,
            "SPLIT_KEYS": self.SPLIT_KEYS,
            "MAX_SPLITS": MAX_SPLITS,
            "BLOCK_H": self.BLOCK_H,
            "BLOCK_S": self.BLOCK_S,
            "BLOCK_R": max(16, triton.next_power_of_2(R)),
            "IN_BRANCH": self.IN_BRANCH,
            "ONCE": self.ONCE,
        }

    def num_splits(self, max_length: int) -> int:
        """Splits of a row of ``max_length`` keys, as `mla.kernels.tiles.split_size` counts them."""
        size = max(self.SPLIT_KEYS, triton.cdiv(max_length, MAX_SPLITS))
        return max(1, triton.cdiv(max_length, triton.cdiv(size, self.BLOCK_S) * self.BLOCK_S))

    def batch_rows(self, num_splits: int, num_rows: int, C: int) -> int:
        """Batch rows of one launch whose partial results fit into `WORKSPACE_BYTES`."""
        return max(1, WORKSPACE_BYTES // (4 * num_splits * num_rows * C))


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def upcast(tensor: Tensor) -> bool:
    """Whether dot operands must be float32: the interpreter misreads the bits of bfloat16."""
    return is_interpreting() and tensor.dtype == torch.bfloat16


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Launch on ``device``: Triton itself takes the current device and the current stream there.

    Every kernel is launched here, because tensors on cuda:1 must not be given to cuda:0.
    """
    if device.type == "cpu" or device.index in (None, torch.cuda.current_device()):
        kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)


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
        major, minor = capability
        name = _CUDA.get(capability, "sm120" if major == 12 else f"sm{major}{minor}")
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
    table = DECODE[architecture]
    operands: Operands = "plain" if isinstance(codec, PlainCodec) else "coded"
    rows = table.get("float32" if dtype == torch.float32 else operands, table["plain"])
    row = next(row for row in rows if num_rows <= row.most_rows and row.most_columns >= C)
    W = min(row.W, max(16, triton.next_power_of_2(C)))
    W = W if isinstance(codec, PlainCodec) else codec.group
    BLOCK_S, stages = row.BLOCK_S, row.num_stages
    plan = DecodePlan(
        row.BLOCK_H, BLOCK_S, row.num_warps, stages, row.SPLIT_KEYS, row.IN_BRANCH, W,
        triton.cdiv(C, W),
    )  # fmt: skip
    # Rows wider than those that the table was made for: fetch less ahead, then fewer keys.
    while shared_bytes(architecture, plan, R, dtype, codec) > SHARED_LIMIT[architecture]:
        if plan.num_stages > 2:
            plan = plan._replace(num_stages=plan.num_stages - 1)
        elif plan.BLOCK_S > 16:
            plan = plan._replace(BLOCK_S=plan.BLOCK_S // 2)
        else:
            break
    return plan._replace(ONCE=_converted_once(architecture, plan, R, dtype, codec))


def _converted_once(
    architecture: str, plan: DecodePlan, R: int, dtype: torch.dtype, codec: Codec
) -> int:
    """As many tiles as leave the number of blocks on a multiprocessor as it is.

    mma.sync takes its operands from registers, so the compiler would convert codes for scores and
    again for values; wgmma and tcgen05 take them from shared memory.
    """
    if isinstance(codec, PlainCodec) or dtype == torch.float32:
        return 0
    if architecture == "interpreter":
        return 1  # so that both ways are tested
    if not architecture.startswith("sm") or (architecture, plan.BLOCK_H) in DECODE_MMA:
        return 0

    def num_blocks(once: int) -> int:
        taken = shared_bytes(architecture, plan._replace(ONCE=once), R, dtype, codec)
        return (SHARED_LIMIT[architecture] + 1024) // (taken + 1024)  # 1 KiB is the system's

    most = max(1, num_blocks(0))
    return max((once for once in range(plan.T + 1) if num_blocks(once) >= most), default=0)


def shared_bytes(
    architecture: str, plan: DecodePlan, R: int, dtype: torch.dtype, codec: Codec
) -> int:
    """Shared memory that the decode kernel takes at most, as compile reports show it."""
    columns, block_r = plan.T * plan.W, max(16, triton.next_power_of_2(R))
    size = dtype.itemsize
    is_nvidia = architecture.startswith("sm")
    rope_bytes = plan.BLOCK_S * block_r * size
    # Operands that wgmma and tcgen05 read in shared memory have one buffer more.
    extra = int(architecture in ("sm90", "sm100") and plan.BLOCK_H >= 64)
    buffers = plan.num_stages - 1
    queries = plan.BLOCK_H * (columns + block_r) * size if is_nvidia else 0
    weights = plan.BLOCK_H * plan.BLOCK_S * size
    scratch = 64 + 4096 * (not is_nvidia)
    if isinstance(codec, PlainCodec):
        keys = (buffers + extra) * (plan.BLOCK_S * columns * size + rope_bytes)
    else:
        num_scales = plan.T + (codec.rope_bits == 8)
        words = num_scales if codec.scale_dtype.itemsize == 4 else (num_scales + 1) // 2
        coded = plan.BLOCK_S * (columns * codec.value_bits // 8 + 4 * words)
        keys = buffers * coded + (buffers + extra) * rope_bytes
        keys += plan.BLOCK_S * plan.W * (plan.T + plan.ONCE) * size
    return queries + weights + keys + scratch


def row_constants(codec: Codec, C: int, R: int) -> dict[str, int]:
    """Where the parts of a row lie, as constants of a kernel, in elements of the rows' storage."""
    if isinstance(codec, PlainCodec):
        return {"KIND": 0, "SCALES_AT": 0, "ROPE_AT": C, "SCALE_BITS": 0, "ROPE_BITS": 16}
    at = codec.sections(C, R)
    return {
        "KIND": KINDS[codec.kind],
        "SCALES_AT": at.scales_at,
        "ROPE_AT": at.rope_at,
        "SCALE_BITS": 8 * codec.scale_dtype.itemsize,
        "ROPE_BITS": codec.rope_bits,
    }


def append_constants(codec: Codec, C: int, R: int) -> dict[str, int]:
    """Sizes of the append kernel that the codec decides."""
    group = 1 if isinstance(codec, PlainCodec) else codec.group
    return {
        "C": C,
        "R": R,
        "GROUP": group,
        "HADAMARD": math.gcd(C, 128) if codec.rotation else 1,
        "BLOCK_C": max(triton.next_power_of_2(C), group, 2),
        "BLOCK_K": triton.next_power_of_2(max(1, (R + 1) // 2)),
    }


def append_warps(C: int) -> int:
    """One warp for 512 columns: all tokens of a step are in flight at once, sums stay in a warp."""
    return min(4, max(1, triton.next_power_of_2(C) // 512))


def page_size(view: CacheView) -> int:
    """Positions in one page; 0 for the dense layout, whose capacity is no constant of a kernel."""
    return 0 if view.page_table is None else view.rows.shape[1]


def view_constants(view: CacheView) -> dict[str, int]:
    """`row_constants` and the layout of ``view``."""
    return {
        **row_constants(view.codec, view.C, view.R),
        "Z": page_size(view),
        "SHARDS": view.shard[1],
    }
