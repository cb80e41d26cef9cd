"""Other rows for the decode table, timed on a GPU: not part of ``all``, and nothing reads it.

Each candidate replaces the row of `mla.kernels.launch` that its case would take. Splits change with
the row, so results may differ from the table's in the last bits; times and bytes are what counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks import gpu_decode, roofline
from benchmarks.gpu_measure import Task
from benchmarks.harness import Point
from mla.kernels import launch
from mla.kernels.launch import DecodeRow

# BLOCK_S, warps, stages, W, scores in a branch
SMALL = ((32, 4, 2), (32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 8, 2), (64, 8, 3), (128, 8, 2))
LARGE = (
    *((32, 3, W, branch) for W in (128, 256, 512) for branch in (False, True)),
    *((64, 2, W, branch) for W in (128, 256) for branch in (False, True)),
)
SMALL_CASES = ((64, 8192), (128, 32768), (1, 65536))
LARGE_CASES = ((64, 4096), (128, 32768))


def points() -> list[Point]:
    found: list[Point] = []
    for B, S in SMALL_CASES:
        for BLOCK_S, warps, stages in SMALL:
            for keys in (512, 1024, 2048):
                found.append(_point(16, B, S, 16, BLOCK_S, warps, stages, keys, 128, False))
    for B, S in LARGE_CASES:
        for BLOCK_S, stages, W, branch in LARGE:
            for keys in (1024, 4096):
                found.append(_point(128, B, S, 64, BLOCK_S, 8, stages, keys, W, branch))
    return found


def _point(H: int, B: int, S: int, *row: int) -> Point:
    names = ("BLOCK_H", "BLOCK_S", "warps", "stages", "split_keys", "W", "branch")
    point: dict[str, Any] = {"impl": "triton", "H": H, "B": B, "S": S, "L": 1, "codec": "plain"}
    return point | {"Z": 64} | dict(zip(names, map(int, row), strict=True))


def cost(point: Point) -> roofline.Cost:
    return gpu_decode.cost(point)


def prepare(point: Point) -> Task:
    _use(point)
    return gpu_decode.prepare(point)


def verify(point: Point) -> None:
    _use(point)
    gpu_decode.verify(point)


def verify_key(point: Point) -> tuple[Any, ...]:
    return tuple(value for key, value in point.items() if key not in ("B", "S"))


def _use(point: Point) -> None:
    """Make the candidate the only row of this device's table, in this process."""
    if launch.is_interpreting():
        return
    row = DecodeRow(
        launch.ALL, *(int(point[key]) for key in ("BLOCK_H", "BLOCK_S", "warps", "stages")),
        SPLIT_KEYS=int(point["split_keys"]), reason="tried",
    )  # fmt: skip
    row = replace(row, W=int(point["W"]), IN_BRANCH=bool(point["branch"]))
    launch.DECODE[launch.architecture(torch.device("cuda"))]["plain"] = (row,)
    launch.decode_plan.cache_clear()
