"""Time candidates fairly on a machine that is not quiet, after checking that they agree.

All candidates of a point live in one process and take turns, one call each per round, so that a
busy neighbour slows all of them alike; compare ratios, and medians with their spread. Two clocks:

    wall    `torch.utils.benchmark.timer`, which waits for an accelerator
    cpu     processor time of the busiest thread of the process. Time taken by other processes is
            not in it, but a thread that spins while it waits for a preempted one counts.

Because the others run in between, every call finds the processor caches as cold as a layer does
in the middle of a model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import timer

Point = Mapping[str, int | str]  # one place of a sweep: {"S": 2048, "dtype": "float32"}


class GateError(AssertionError):
    """A candidate computes something else; its time means nothing."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to do the work of a point.

    Attributes:
        run: the timed call; its result goes to the gate.
        before, after: untimed, around every call: prepare it, take back what it changed.
        num_bytes: that one unit of work must read and write at least; None: not meaningful.
        num_flops: that one unit of work computes; None: not meaningful.
        units: how many units of work one call does; times are per unit.
    """

    run: Callable[[], Tensor | None]
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing
    num_bytes: int | None = None
    num_flops: int | None = None
    units: int = 1


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass
class Timing:
    """Seconds per unit of one candidate, one entry a round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def spread(values: Sequence[float]) -> Spread:
    """Percentiles with linear interpolation between the sorted values; NaN without values."""
    if not values:
        return Spread(*[float("nan")] * 3)
    at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def paired_ratio(baseline: Sequence[float], values: Sequence[float]) -> float:
    """Median over the rounds of baseline / value: how many times faster, load cancelled.

    NaN where one of them has no values.
    """
    if not baseline or not values:
        return float("nan")
    return median(b / v for b, v in zip(baseline, values, strict=True))


def measure(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int,
    seconds: float = float("inf"),
    on_round: Callable[[], None] = _nothing,
) -> dict[str, Timing]:
    """Run the candidates in turns.

    Args:
        candidates: by name; a first call of each is not counted.
        rounds: calls of each that count.
        seconds: stop earlier, after 3 rounds at the least, when the point has taken this long.
        on_round: called after every round.
    """
    timings = {name: Timing() for name in candidates}
    for candidate in candidates.values():
        timed(candidate)
    deadline = time.monotonic() + seconds
    for index in range(rounds):
        for name, candidate in candidates.items():
            wall, cpu = timed(candidate)
            timings[name].wall.append(wall)
            timings[name].cpu.append(cpu)
        on_round()
        if index >= 2 and time.monotonic() > deadline:
            break
    return timings


def gate(
    results: Mapping[str, Tensor], *, expected: Tensor | None, tolerance: float, point: Point
) -> None:
    """Refuse to time a candidate whose result is not that of the oracle.

    Args:
        results: what the candidates gave; the first one is the baseline.
        expected: of the oracle in float64; None: the baseline stands for it.
        tolerance: largest error that the baseline may have, relative to the largest value. The
            others may have twice the error of the baseline, or half the tolerance.

    Raises:
        GateError: naming the candidate, the point and the error.
    """
    names = list(results)
    truth = (results[names[0]] if expected is None else expected).double()
    size = truth.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    budget = tolerance
    for name in names:
        result = results[name].double()
        if result.shape != truth.shape:
            raise GateError(f"{name} at {label(point)}: shape {tuple(result.shape)}")
        error = ((result - truth).abs().max() / size).item()
        if not error <= budget:  # NaN fails too
            raise GateError(f"{name} at {label(point)}: error {error:.1e}, allowed {budget:.1e}")
        if name == names[0]:
            budget = max(2 * error, tolerance / 2)


OUT_OF_MEMORY = "out of memory"
_MEMORY_WORDS = (
    "out of memory",  # CUDA and HIP, when another library asks for the memory
    "can't allocate memory",  # the CPU allocator
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a candidate failed for want of memory, host or device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in _MEMORY_WORDS)


def release_memory() -> None:
    """After a failed allocation: drop what only a traceback held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def label(point: Point) -> str:
    """``dtype=float32 S=2048``."""
    return " ".join(f"{key}={value}" for key, value in point.items())


def timed(candidate: Candidate) -> tuple[float, float]:
    """Wall and busiest-thread seconds per unit of one call."""
    candidate.before()
    cpu_before = thread_seconds()
    start = timer()
    candidate.run()
    wall = timer() - start
    cpu_after = thread_seconds()
    candidate.after()
    cpu = max(seconds - cpu_before.get(thread, 0.0) for thread, seconds in cpu_after.items())
    return wall / candidate.units, cpu / candidate.units


def thread_seconds() -> dict[int, float]:
    """Processor seconds of each thread of this process; of all together where there is no /proc."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return {0: time.process_time()}
    seconds = {}
    for entry in tasks.iterdir():
        thread = int(entry.name)
        # The clock id that pthread_getcpuclockid gives, which is not offered for foreign threads.
        clock: Any = (~thread << 3) | 6
        try:
            seconds[thread] = time.clock_gettime(clock)
        except OSError:  # the thread has just ended
            continue
    return seconds
