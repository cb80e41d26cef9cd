"""Two worker processes, one in the tree of each version, that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch

from benchmarks.harness import Point
from benchmarks.sweep import Options

Rounds = list[tuple[float, float]]  # seconds in BASE and here, one entry a round
ENOUGH_SECONDS, MOST_CALLS = 4e-3, 20  # of one candidate in one round
FEWEST_ROUNDS = 9
WALL, CPU = 0, 1  # places in a worker's times


class WorkerError(ValueError):
    """A worker ended, or runs another package than it should; the message is one line."""


class Measured(NamedTuple):
    """What became of one point.

    Attributes:
        rounds: by candidate, those that both versions have.
        only_base, only_here: candidates of one version.
        error_base, error_here: why a version could not run the point.
    """

    rounds: dict[str, Rounds]
    only_base: tuple[str, ...] = ()
    only_here: tuple[str, ...] = ()
    error_base: str | None = None
    error_here: str | None = None


class Worker:
    """`benchmarks.compare_worker` in ``tree``."""

    def __init__(self, tree: Path, log: IO[str]) -> None:
        self.tree, self._log = tree, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare_worker"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def hello(self) -> None:
        """Wait until it has started, from its own tree."""
        package = Path(self.receive()["package"])
        if package.resolve() != (self.tree / "mla").resolve():
            raise WorkerError(f"the worker of {self.tree} imports {package}")

    def ask(self, request: Any) -> Any:
        self.send(request)
        return self.receive()

    def send(self, request: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None

    def receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:] or ["no message"]
        return f"the worker of {self.tree} ended with status {status}: {last[0]}"


class Pair:
    """Both workers; leaving the context ends them."""

    def __init__(self, base: Path, here: Path, options: Options) -> None:
        self.options = options
        self._workers: list[Worker] = []
        self._trees = (base, here)
        self._open = ExitStack()

    def __enter__(self) -> Pair:
        try:
            for tree in self._trees:
                log = self._open.enter_context(tempfile.TemporaryFile("w+"))
                self._workers.append(Worker(tree, log))
                self._open.callback(self._workers[-1].close)
            for worker in self._workers:
                worker.hello()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def measure(self, name: str, point: Point, on_round: Callable[[], None]) -> Measured:
        """All rounds of one point; the version that goes first changes from round to round."""
        request = {
            "name": name,
            "point": dict(point),
            "options": {"quick": self.options.quick, "threads": torch.get_num_threads()},
        }
        replies = [worker.ask(request) for worker in self._workers]
        ready = [reply.get("ready", {}) for reply in replies]
        both = [impl for impl in ready[1] if impl in ready[0]]
        rounds: dict[str, Rounds] = {impl: [] for impl in both}
        if both:
            calls = {impl: _calls(max(x[impl] for x in ready)) for impl in both}
            clock = WALL if torch.cuda.is_available() else CPU
            deadline = time.monotonic() + self.options.seconds
            for index in range(self.options.rounds):
                if index >= FEWEST_ROUNDS and time.monotonic() > deadline:
                    break
                times: list[Any] = [None, None]
                for turn in (0, 1) if index % 2 else (1, 0):
                    times[turn] = self._workers[turn].ask({"calls": calls})["times"]
                for impl in both:
                    rounds[impl].append((times[0][impl][clock], times[1][impl][clock]))
                on_round()
        for worker, reply in zip(self._workers, replies, strict=True):
            if "ready" in reply:
                worker.send({"stop": True})
        return Measured(
            rounds,
            only_base=tuple(impl for impl in ready[0] if impl not in both),
            only_here=tuple(impl for impl in ready[1] if impl not in both),
            error_base=replies[0].get("error"),
            error_here=replies[1].get("error"),
        )


def _calls(seconds: float) -> int:
    """So many that a round of them is long enough for the clock."""
    return max(1, min(MOST_CALLS, int(ENOUGH_SECONDS / max(seconds, 1e-9))))
