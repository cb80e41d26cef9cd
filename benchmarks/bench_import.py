"""What `import mla` costs beyond `import torch`, each time in a fresh process.

The clock runs inside the process, around the one import, so starting Python is not in it. The
modules below are the dearest of those that mla adds, by their own time (``python -X importtime``,
which makes everything slower).
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable

from benchmarks.harness import Point, Timing, spread
from benchmarks.report import ROOT, Row
from benchmarks.sweep import Benchmark, Options, main

TARGET_MS = 300
NUM_MODULES = 8
# What is timed, and what is imported before the clock starts.
IMPORTS = {"torch": "sys", "mla": "torch"}
TIMED = """
import time, {before}
wall, cpu = time.perf_counter(), time.process_time()
import {name}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
TRACED = "import sys, torch; print('after torch', file=sys.stderr, flush=True); import mla"


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    timings = {name: Timing() for name in IMPORTS}
    own_times: dict[str, list[float]] = defaultdict(list)
    for index in range(options.rounds + 1):
        for name, before in IMPORTS.items():
            wall, cpu = map(float, _python("-c", TIMED.format(before=before, name=name)).split())
            if index:  # the first round may compile bytecode and fill the file cache
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
        if index % 3 == 1:
            for module, milliseconds in _own_times().items():
                own_times[module].append(milliseconds)
        on_round()
    medians = {module: spread(times).median for module, times in own_times.items()}
    dearest = sorted(medians, key=lambda module: -medians[module])[:NUM_MODULES]
    return [_import_row(name, timings[name]) for name in IMPORTS] + [
        {"import": f"  module {module}", "median_ms": medians[module]} for module in dearest
    ]


def _import_row(name: str, timing: Timing) -> Row:
    wall = spread(timing.wall)
    return {
        "import": name if name == "torch" else f"{name}, after torch",
        "median_ms": 1e3 * wall.median,
        "p20_ms": 1e3 * wall.p20,
        "p80_ms": 1e3 * wall.p80,
        "cpu_ms": 1e3 * spread(timing.cpu).median,
        "target_ms": TARGET_MS if name == "mla" else None,
    }


def _own_times() -> dict[str, float]:
    """Milliseconds of each module that `import mla` loads after torch, without what it imports."""
    trace = _python("-X", "importtime", "-c", TRACED, stream="stderr")
    lines = trace.split("after torch\n", 1)[1].splitlines()
    fields = [line.removeprefix("import time:").split("|") for line in lines if "|" in line]
    return {name.strip(): int(own) / 1e3 for own, _, name in fields}


def _python(*arguments: str, stream: str = "stdout") -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    output: str = getattr(done, stream)
    return output


BENCHMARK = Benchmark(
    name="import",
    title="Time of `import mla` beyond `import torch`, fresh processes",
    points=lambda quick: [{}],
    rows_at=rows_at,
    steps=lambda options: options.rounds + 1,
    is_long=True,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
