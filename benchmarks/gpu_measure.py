"""Time calls on a GPU: events, cold L2, medians; ceilings of the device; rows in CSV and JSON.

A call is captured into a CUDA graph where that works, so that the time between the kernels of one
call is the device's and not Python's. L2 is overwritten before each call, as a model's other
layers would do. Calls of microseconds, which two events cannot time, are several in one graph, each
with buffers of its own, larger than L2 together. Nothing here needs more than torch and triton.
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Spread
from benchmarks.roofline import Cost

Row = dict[str, Any]


ENOUGH_BYTES = 1 << 28  # several times any L2; a call of so many takes 70 us at least
MOST_CALLS = 16


class Task(NamedTuple):
    """What is timed, and what one call of it costs."""

    run: Callable[[], Any]
    cost: Cost
    capture: bool = True
    calls: int = 1  # that ``run`` makes


def num_calls(cost: Cost) -> int:
    """How many calls of this cost to time together."""
    return max(1, min(MOST_CALLS, -(-ENOUGH_BYTES // max(1, cost.num_bytes))))


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that makes all of them."""

    def run() -> None:
        for call in calls:
            call()

    return run


def time_call(task: Task, *, repeat_ms: int = 100) -> Spread:
    """Milliseconds of one call: median, 20th and 80th percentile."""
    from triton.testing import do_bench

    call = _captured(task.run) if task.capture else task.run
    times = do_bench(call, warmup=20, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8])
    return Spread(*(time / task.calls for time in times))


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of ``run``, or itself where it cannot be captured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # PyTorch's prefill reads lengths on the host: it is timed with its launches, and said so.
        reason = " ".join(str(error).split())[:200]
        print(f"gpu: not captured, timed with its launches: {reason}", file=sys.stderr)
        torch.cuda.synchronize()
        return run
    return graph.replay


@cache
def ceilings() -> dict[str, float]:
    """Measured now: bytes/s of a large device copy, flop/s of a large bfloat16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = time_call(Task(lambda: target.copy_(source), Cost(0, 0), capture=False)).median
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    product = time_call(Task(lambda: a @ a, Cost(0, 0), capture=False)).median
    return {
        "copy_bytes_per_second": 2 * source.nbytes / (copy * 1e-3),
        "matmul_flops_per_second": 2 * size**3 / (product * 1e-3),
    }


def figures(spread: Spread | None, cost: Cost, limits: Mapping[str, float]) -> Row:
    """The columns of one timed call; times are empty without a measurement."""
    row: Row = {
        "median_ms": None,
        "p20_ms": None,
        "p80_ms": None,
        "bytes": cost.num_bytes,
        "partial_bytes": cost.partial_bytes,
        "flops": cost.num_flops,
        "bytes_per_second": None,
        "flops_per_second": None,
        "share_of_copy": None,
        "share_of_matmul": None,
    }
    if spread is None:
        return row
    seconds = 1e-3 * spread.median
    speed, rate = cost.num_bytes / seconds, cost.num_flops / seconds
    return row | {
        "median_ms": spread.median,
        "p20_ms": spread.p20,
        "p80_ms": spread.p80,
        "bytes_per_second": speed,
        "flops_per_second": rate,
        "share_of_copy": speed / limits["copy_bytes_per_second"],
        "share_of_matmul": rate / limits["matmul_flops_per_second"],
    }


def environment(commit: str) -> Row:
    """What the numbers depend on besides the code."""
    has_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_cuda else "none",
        "driver": _driver() if has_cuda else "none",
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "commit": commit,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def write(part: str, rows: Sequence[Row], facts: Row, folder: Path) -> None:
    """``gpu_<part>.csv``, where every row carries the facts, and ``gpu_<part>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    full = [{"part": part, **row, **facts} for row in rows]
    columns = list(dict.fromkeys(key for row in full for key in row))
    with (folder / f"gpu_{part}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or ["part"])
        writer.writeheader()
        writer.writerows(full)
    document = {"part": part, "environment": facts, "rows": list(rows)}
    path = folder / f"gpu_{part}.json"
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)  # a run that is killed leaves the rows so far


def read(part: str, folder: Path) -> tuple[Row, list[Row]]:
    """Environment and rows that an earlier run left; empty where there are none."""
    path = folder / f"gpu_{part}.json"
    if not path.is_file():
        return {}, []
    document = json.loads(path.read_text())
    return document["environment"], document["rows"]
