"""Run the points of one part, one after the other, so that no failure loses what was measured.

Rows are written after every point. A point is noted before it starts: when the process dies in it,
the next process goes on behind it. Points of an earlier run in the same folder, with the same
device, versions and commit, are not measured again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import gpu_append, gpu_decode, gpu_measure, gpu_prefill, gpu_tune
from benchmarks.gpu_measure import Row
from benchmarks.harness import GateError, Point, label
from mla.kernels import launch

MODULES: dict[str, ModuleType] = {
    "decode": gpu_decode,
    "prefill": gpu_prefill,
    "append": gpu_append,
    "tune": gpu_tune,
}
NO_TIME = "out of time"
UNFINISHED = "did not finish"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line chose."""

    out: Path
    commit: str = "unknown"
    seconds: float = 540.0
    only: tuple[str, ...] = ()  # key=value
    dry_run: bool = False
    fresh: bool = False

    def wants(self, point: Point) -> bool:
        return set(self.only) <= set(label(point).split())


def run_points(part: str, options: Options, *, say: Callable[[str], None] = print) -> list[Row]:
    """Measure what is missing; all rows of the part."""
    module = MODULES[part]
    facts = gpu_measure.environment(options.commit)
    deadline = time.monotonic() + options.seconds
    rows = earlier_rows(part, options, facts)
    limits = {} if options.dry_run else gpu_measure.ceilings()
    verdicts: dict[Any, str] = {}
    for point in module.points():
        if not options.wants(point) or any(_is_done(row, point) for row in rows):
            continue
        rows = [row for row in rows if not _is_of(row, point)]
        row: Row = {**point, "error": UNFINISHED}
        gpu_measure.write(part, [*rows, row], facts, options.out)
        if time.monotonic() > deadline:
            row["error"] = NO_TIME
        else:
            row |= _measured(module, point, limits, options.dry_run, verdicts)
        rows.append(row)
        gpu_measure.write(part, rows, facts, options.out)
        say(f"{part}: {label(point)}: {_summary(row)}")
    gpu_measure.write(part, rows, {**facts, **limits}, options.out)
    return rows


def earlier_rows(part: str, options: Options, facts: Row) -> list[Row]:
    """Rows of an earlier run that still hold."""
    earlier, rows = gpu_measure.read(part, options.out)
    is_same = {key: earlier.get(key) for key in facts} == facts
    return rows if is_same and not options.fresh and not options.dry_run else []


def _is_of(row: Row, point: Point) -> bool:
    return all(row.get(key) == value for key, value in point.items())


def _is_done(row: Row, point: Point) -> bool:
    return _is_of(row, point) and row.get("error") != NO_TIME


def _measured(
    module: ModuleType,
    point: Point,
    limits: Row,
    dry_run: bool,
    verdicts: dict[Any, str],
) -> Row:
    """The columns of one point; ``error`` says why times are missing."""
    try:
        if not dry_run or launch.is_interpreting():
            _check(module, point, verdicts)
        if dry_run:
            return {"error": "", **gpu_measure.figures(None, module.cost(point), limits)}
        task = module.prepare(point)
        spread = gpu_measure.time_call(task)
        return {"error": "", **gpu_measure.figures(spread, task.cost, limits)}
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # a point that cannot run is a result
        if is_device_lost():
            raise
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        task = None  # its tensors
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def _check(module: ModuleType, point: Point, verdicts: dict[Any, str]) -> None:
    """Hold the kernel of this point against the oracle, once."""
    key = module.verify_key(point)
    if key not in verdicts:
        verdicts[key] = "not checked"
        module.verify(point)
        verdicts[key] = ""
    if verdicts[key]:
        raise GateError(verdicts[key])


def is_device_lost() -> bool:
    """Whether nothing more can run in this process, as after an illegal access."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _summary(row: Row) -> str:
    if row["error"]:
        return str(row["error"])
    if row["median_ms"] is None:
        return "not timed"
    return (
        f"{row['median_ms']:.3f} ms, {row['bytes_per_second'] / 1e9:.0f} GB/s "
        f"({row['share_of_copy']:.0%} of copy), {row['flops_per_second'] / 1e12:.1f} TFLOP/s"
    )


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows whose error is a fault of ours: not memory, not time, not a backend that cannot run."""
    mine = ("triton", "engines", "torch")
    excused = ("out of memory", NO_TIME, "")
    return [row for row in rows if row["error"] not in excused and row.get("impl") in mine]
