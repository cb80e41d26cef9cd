"""One version's half of `benchmarks.compare`: times what it is asked to, one round at a time.

Runs in the tree of its version. Requests are JSON lines on standard input, replies on standard
output; what benchmarks print goes to standard error.

    {"name": .., "point": .., "options": ..}   prepare: candidates are set up and pass their gate
    -> {"ready": {impl: seconds}} or {"error": ".."} or {"done": true} where nothing was timed
    {"calls": {impl: count}}                   one round: the median of so many calls of each
    -> {"times": {impl: [wall, cpu]}}
    {"stop": true}                             the point is finished

Candidates that run no code of the package are left out: no version can change them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, NoReturn

import torch

import mla
from benchmarks.harness import Candidate, Timing, timed
from benchmarks.sweep import Benchmark, Options

PACKAGE = str(Path(mla.__file__).parent) + os.sep


class Finished(Exception):
    """The parent has seen enough rounds."""


def runs_package(candidate: Candidate) -> bool:
    """Whether a call enters a file of the package."""
    seen = False

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        seen = seen or frame.f_code.co_filename.startswith(PACKAGE)

    candidate.before()
    sys.setprofile(look)
    try:
        candidate.run()
    finally:
        sys.setprofile(None)
    candidate.after()
    return seen


def serve(receive: Callable[[], Any], send: Callable[[Any], None]) -> None:
    """Answer until the input ends."""

    def lockstep(candidates: Mapping[str, Candidate], **options: Any) -> NoReturn:
        """In the place of `harness.measure`."""
        chosen = {name: x for name, x in candidates.items() if runs_package(x)}
        send({"ready": {name: timed(candidate)[0] for name, candidate in chosen.items()}})
        while "calls" in (request := receive()):
            calls = request["calls"]
            send({"times": {name: _round(chosen[name], calls[name]) for name in calls}})
        raise Finished

    while (request := receive()) is not None:
        torch.set_num_threads(request["options"]["threads"])
        options = Options(quick=request["options"]["quick"], measure=lockstep)
        try:
            benchmark: Benchmark = import_module(f"benchmarks.bench_{request['name']}").BENCHMARK
            benchmark.rows_at(request["point"], options, lambda: None)
            send({"done": True})
        except Finished:
            continue
        except Exception as error:  # whatever this version cannot do is a result
            send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def _round(candidate: Candidate, calls: int) -> list[float]:
    timing = Timing()
    for _ in range(calls):
        wall, cpu = timed(candidate)
        timing.wall.append(wall)
        timing.cpu.append(cpu)
    return [median(timing.wall), median(timing.cpu)]


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def receive() -> Any:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def send(message: Any) -> None:
        replies.write(json.dumps(message) + "\n")

    send({"package": PACKAGE})
    serve(receive, send)


if __name__ == "__main__":
    main()
