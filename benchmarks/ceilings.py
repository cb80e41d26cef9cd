"""What this machine can do at most, measured in the run whose rows are compared with it.

    read, copy    bytes/s of a buffer larger than any cache, summed or copied; a copy counts twice
    matmul        flop/s of a large product in a dtype
    registers     flop/s of multiply-adds without memory, all threads: CPUs with our extension

Each is the best of a few turns. On a CPU the clock is processor time of the busiest thread, as for
the candidates, so that load slows both or neither; on an accelerator it is wall time.

    limit = max(bytes / read, flops / max(matmul, registers))

A call whose data stay in the processor's caches can pass it where memory is what bounds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Candidate, measure
from benchmarks.report import Row, Value

ROUNDS = 7
CPU_BYTES, GPU_BYTES = 1 << 28, 1 << 30
CPU_SIZE, GPU_SIZE = 1024, 8192
PEAK_STEPS = 1_000_000


class Limit(NamedTuple):
    """Seconds that a call takes at least."""

    seconds: float
    bound: str  # "memory" | "arithmetic"


_measured: dict[str, float] = {}


def measured() -> dict[str, float]:
    """All that were needed so far, by name: ``read cpu``, ``matmul bfloat16 cpu``."""
    return dict(sorted(_measured.items()))


def limit_of(num_bytes: float, num_flops: float, *, dtype: str, device: str = "cpu") -> Limit:
    """The roofline of one call; ceilings are measured when they are first needed."""
    by_memory = num_bytes / bandwidth("read", device) if num_bytes else 0.0
    by_arithmetic = num_flops / arithmetic(dtype, device) if num_flops else 0.0
    if by_memory > by_arithmetic:
        return Limit(by_memory, "memory")
    return Limit(by_arithmetic, "arithmetic")


@cache
def bandwidth(kind: str, device: str) -> float:
    """Bytes per second of ``read`` or ``copy``."""
    source = torch.ones((CPU_BYTES if device == "cpu" else GPU_BYTES) // 4, device=device)
    target = torch.empty_like(source)
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "read": (lambda: source.sum(), source.nbytes),
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
    }
    for name, (run, num_bytes) in runs.items():
        _measured[f"{name} {device}"] = num_bytes / _best(run, device)
    return _measured[f"{kind} {device}"]


@cache
def arithmetic(dtype: str, device: str) -> float:
    """Flops per second of the best that this machine was seen to do in ``dtype``."""
    size = CPU_SIZE if device == "cpu" else GPU_SIZE
    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    b = torch.ones_like(a)
    product = 2 * size**3 / _best(lambda: a @ b, device)
    _measured[f"matmul {dtype} {device}"] = product
    registers = registers_peak(dtype) if device == "cpu" else None
    if registers is None:
        return product
    _measured[f"registers {dtype} {device}"] = registers
    return max(product, registers)


def registers_peak(dtype: str) -> float | None:
    """Flops per second of all threads in registers; None where nothing here can measure it."""
    from mla.kernels import cpu

    if dtype not in ("float32", "bfloat16") or cpu.reason_absent() is not None:
        return None
    is_bf16 = dtype == "bfloat16" and "avx512bf16" in cpu.describe().instruction_sets
    rates = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        flops = cpu.run_peak(PEAK_STEPS, bf16=is_bf16)
        rates.append(flops / (time.thread_time() - start))
    return max(rates) * torch.get_num_threads()


def share_of_limit(row: Row) -> dict[str, Value]:
    """Columns of a row that has a time: ``of_limit`` is the least time over the time it took.

    ``dtype`` is float32 and ``device`` the CPU where the row does not say. Empty without bytes and
    flops.
    """
    counts = [float(row.get(key) or 0) for key in ("bytes", "flops")]
    device = str(row.get("device", "cpu"))
    clock = "cpu" if device == "cpu" else "median"
    units = {f"{clock}_ms": 1e-3, f"{clock}_us": 1e-6}
    times = [float(row[key] or 0) * unit for key, unit in units.items() if row.get(key)]
    if not times or times[0] != times[0] or not any(counts):
        return {}
    limit = limit_of(*counts, dtype=str(row.get("dtype", "float32")), device=device)
    share = limit.seconds / times[0]
    return {"of_limit": share, "limit_ms": 1e3 * limit.seconds, "bound": limit.bound}


def _best(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of a few calls."""
    timing = measure({"": Candidate(run=run)}, rounds=ROUNDS)[""]
    return min(timing.cpu if device == "cpu" else timing.wall)
