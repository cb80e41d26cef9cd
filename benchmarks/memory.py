"""Peak memory of a call: the most bytes that it holds at once beyond what was there before it.

On CUDA from the caching allocator. Elsewhere from the memory events of PyTorch's profiler, which
sees every tensor, also those inside an op; scratch that C++ kernels keep for themselves is not in
it (about 1 MiB a thread).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Row

MEBIBYTE = 1 << 20


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes held at once during ``run()``, its result included, once it has been warmed up."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    # Else the profiler writes two lines for every use. Read at its first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    del result
    return _highest(found)


def _highest(found: Any) -> int:
    """Highest running sum of the bytes that were taken and given back."""
    events = found.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    total = highest = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        total += change
        highest = max(highest, total)
    return highest


def with_peak(row: Row, run: Callable[[], Any]) -> dict[str, Any]:
    """The row with ``peak_MiB`` of one call."""
    return {**row, "peak_MiB": peak_bytes(run) / MEBIBYTE}
