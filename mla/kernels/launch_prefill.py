"""How the prefill kernels are launched: (architecture, kernel, widths) -> tiles, warps, stages.

As in `mla.kernels.launch` nothing is tuned at run time. Every promised row is compiled for its
target; see `mla.kernels.prefill_variants` for shared memory, registers and spills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["forward", "keys", "queries"]
ANY = 1 << 30


@dataclass(frozen=True)
class PrefillRow:
    """Tile of one kernel for N + R + V of up to ``most_columns``, padded to their tiles."""

    most_columns: int
    BLOCK_L: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    reason: str


@dataclass(frozen=True)
class ExpandRow:
    """Tile of the product that expands keys and values."""

    BLOCK_T: int
    BLOCK_O: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


WIDE = PrefillRow(ANY, 16, 16, 4, 1, "wider than any preset: slow, but it fits")
PREFILL: dict[tuple[str, Kernel], tuple[PrefillRow, ...]] = {
    ("sm80", "forward"): (
        PrefillRow(320, 128, 64, 8, 3, "two buffers ahead of the products, 131 KB"),
        PrefillRow(512, 64, 32, 8, 2, "wider tiles spill"),
        WIDE,
    ),
    ("sm80", "keys"): (
        PrefillRow(160, 32, 64, 4, 2, "accumulators and the tile's keys lie in registers"),
        PrefillRow(256, 32, 64, 8, 2, "as above"),
        PrefillRow(320, 32, 32, 4, 2, "64 keys spill 308 bytes"),
        PrefillRow(512, 32, 32, 8, 2, "4 warps spill 60 bytes"),
        WIDE,
    ),
    ("sm80", "queries"): (
        PrefillRow(160, 128, 64, 8, 2, "as the forward pass"),
        PrefillRow(256, 128, 32, 8, 2, "64 keys spill 24 bytes"),
        PrefillRow(320, 32, 32, 4, 2, "64 queries spill 8 to 44 bytes"),
        PrefillRow(512, 32, 32, 4, 2, "wider tiles spill"),
        WIDE,
    ),
    ("sm86", "forward"): (
        PrefillRow(256, 128, 64, 8, 2, "66 of 99 KB"),
        PrefillRow(320, 128, 32, 8, 3, "90 of 99 KB; 64 keys spill up to 40 bytes"),
        PrefillRow(512, 64, 32, 8, 2, "wider tiles do not fit"),
        WIDE,
    ),
    ("sm86", "keys"): (
        PrefillRow(160, 32, 64, 4, 2, "as on sm80"),
        PrefillRow(256, 32, 64, 8, 2, "as on sm80"),
        PrefillRow(320, 32, 32, 4, 2, "64 keys spill 368 bytes"),
        PrefillRow(512, 32, 32, 8, 2, "as on sm80"),
        WIDE,
    ),
    ("sm86", "queries"): (
        PrefillRow(256, 128, 32, 8, 2, "82 of 99 KB"),
        PrefillRow(320, 32, 64, 4, 2, "64 queries spill up to 8 bytes"),
        PrefillRow(512, 32, 32, 4, 2, "wider tiles do not fit"),
        WIDE,
    ),
    ("sm90", "forward"): (
        PrefillRow(256, 128, 128, 8, 3, "up to 229 KB: loads are two tiles ahead"),
        PrefillRow(320, 128, 64, 8, 3, "with 128 keys and two stages loads start too late"),
        PrefillRow(512, 128, 64, 8, 2, "197 KB; a third stage does not fit"),
        WIDE,
    ),
    ("sm90", "keys"): (
        PrefillRow(160, 64, 128, 8, 3, "128 keys are two warp groups of 64 rows"),
        PrefillRow(320, 32, 128, 8, 3, "64 queries spill 136 to 788 bytes"),
        PrefillRow(512, 32, 64, 8, 3, "the accumulators of 128 keys would be 256 registers"),
        WIDE,
    ),
    ("sm90", "queries"): (
        PrefillRow(160, 128, 128, 8, 3, "as the forward pass"),
        PrefillRow(320, 128, 64, 8, 3, "128 keys spill or do not fit"),
        PrefillRow(512, 64, 32, 8, 3, "164 KB; 64 keys spill up to 52 bytes"),
        WIDE,
    ),
    ("sm100", "forward"): (
        PrefillRow(256, 128, 128, 8, 3, "tcgen05 of 128 keys; up to 230 KB"),
        PrefillRow(320, 128, 64, 8, 3, "128 keys spill 40 bytes"),
        PrefillRow(512, 64, 64, 8, 2, "128 queries spill 32 bytes"),
        WIDE,
    ),
    ("sm100", "keys"): (
        PrefillRow(256, 64, 128, 8, 2, "tcgen05; accumulators lie in tensor memory"),
        PrefillRow(320, 32, 128, 8, 3, "64 queries pass the 512 columns of tensor memory"),
        PrefillRow(512, 32, 64, 8, 2, "64 queries do not fit"),
        WIDE,
    ),
    ("sm100", "queries"): (
        PrefillRow(256, 128, 64, 8, 3, "tcgen05; 188 KB"),
        PrefillRow(320, 128, 64, 8, 2, "three stages do not fit"),
        PrefillRow(512, 64, 32, 4, 2, "64 keys do not fit"),
        WIDE,
    ),
    ("gfx942", "forward"): (
        PrefillRow(512, 128, 64, 4, 1, "32 of 64 KB, 505 registers"),
        WIDE,
    ),
    ("gfx942", "keys"): (
        PrefillRow(256, 64, 64, 4, 1, "453 registers"),
        PrefillRow(320, 32, 64, 4, 1, "64 queries spill 92 bytes"),
        PrefillRow(512, 32, 32, 4, 1, "64 keys spill 40 bytes"),
        WIDE,
    ),
    ("gfx942", "queries"): (
        PrefillRow(256, 128, 32, 8, 1, "232 registers"),
        PrefillRow(320, 64, 64, 4, 1, "473 registers; 128 queries spill 80 bytes"),
        PrefillRow(512, 64, 32, 4, 1, "64 keys spill"),
        WIDE,
    ),
    ("gfx950", "forward"): (
        PrefillRow(320, 128, 64, 4, 2, "160 KB of shared memory: one buffer ahead"),
        PrefillRow(512, 128, 32, 4, 2, "64 keys spill 68 bytes"),
        WIDE,
    ),
    ("gfx950", "keys"): (
        PrefillRow(160, 64, 64, 4, 1, "two stages spill"),
        PrefillRow(256, 32, 64, 4, 2, "64 queries spill 40 bytes"),
        PrefillRow(320, 32, 64, 4, 1, "two stages spill up to 104 bytes"),
        PrefillRow(512, 32, 32, 4, 1, "64 keys spill"),
        WIDE,
    ),
    ("gfx950", "queries"): (
        PrefillRow(160, 128, 32, 8, 2, "216 registers"),
        PrefillRow(320, 64, 64, 4, 2, "128 queries spill 72 bytes"),
        PrefillRow(512, 64, 32, 4, 2, "64 keys spill"),
        WIDE,
    ),
    ("interpreter", "forward"): (PrefillRow(ANY, 16, 16, 1, 1, "small tests shall loop"),),
    ("interpreter", "keys"): (PrefillRow(ANY, 16, 16, 1, 1, "small tests shall loop"),),
    ("interpreter", "queries"): (PrefillRow(ANY, 16, 16, 1, 1, "small tests shall loop"),),
}
for _kernel in ("forward", "keys", "queries"):
    PREFILL["sm120", _kernel] = PREFILL["sm86", _kernel]  # the same shared memory and mma.sync
# float32 products take no tensor cores where they must be exact: registers are the limit.
FLOAT32: dict[Kernel, tuple[PrefillRow, ...]] = {
    "forward": (PrefillRow(320, 16, 32, 8, 1, "32 queries spill 12 to 320 bytes"), WIDE),
    "keys": (PrefillRow(320, 16, 32, 8, 1, "no tensor cores"), WIDE),
    "queries": (PrefillRow(320, 16, 16, 8, 1, "32 queries spill 4 to 8 bytes"), WIDE),
}
EXPAND: dict[str, ExpandRow] = {
    "sm80": ExpandRow(128, 128, 32, 8, 4),
    "sm86": ExpandRow(128, 128, 32, 8, 3),
    "sm90": ExpandRow(128, 128, 64, 8, 3),
    "sm100": ExpandRow(128, 256, 64, 8, 4),
    "sm120": ExpandRow(128, 128, 32, 8, 3),
    "gfx942": ExpandRow(128, 128, 32, 4, 2),
    "gfx950": ExpandRow(128, 128, 64, 4, 2),
    "interpreter": ExpandRow(32, 32, 32, 1, 1),
}
EXPAND_FLOAT32 = ExpandRow(64, 64, 16, 4, 2)


def prefill_row(architecture: str, kernel: Kernel, columns: int, dtype: torch.dtype) -> PrefillRow:
    """The first row of the table that is wide enough."""
    rows = PREFILL[architecture, kernel]
    if dtype == torch.float32 and architecture != "interpreter":
        rows = FLOAT32[kernel]
    return next(row for row in rows if columns <= row.most_columns)


def expand_row(architecture: str, dtype: torch.dtype) -> ExpandRow:
    if dtype == torch.float32 and architecture != "interpreter":
        return EXPAND_FLOAT32
    return EXPAND[architecture]
