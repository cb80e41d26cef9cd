"""A benchmark as data, and its command line: ``python -m benchmarks.bench_NAME --quick``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks.harness import (
    Candidate,
    GateError,
    Point,
    Timing,
    gate,
    label,
    measure,
    paired_ratio,
    spread,
)
from benchmarks.report import ROOT, Row, Value, show, terminal, write

# Largest error of the baseline against the float64 oracle, relative to the largest value.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line chose."""

    quick: bool = False
    only: tuple[str, ...] = ()
    rounds: int = 21
    seconds: float = 60.0
    out: Path = ROOT / "out" / "bench"

    def wants(self, point: Point) -> bool:
        """Whether every ``key=value`` of ``--only`` is one of the point's."""
        return set(self.only) <= set(label(point).split())


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One question, its points and how a point becomes rows.

    Attributes:
        name: of the files under out/bench.
        title: what the table shows, in one line.
        points: of a quick (True) or a full (False) run.
        rows_at: measures one point; calls its last argument whenever some progress was made.
        steps: how often it calls that for one point.
        hidden: columns for the files only.
    """

    name: str
    title: str
    points: Callable[[bool], Sequence[Point]]
    rows_at: Callable[[Point, Options, Callable[[], None]], list[Row]]
    steps: Callable[[Options], int] = lambda options: options.rounds
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Candidates that are timed against each other; the first is the baseline.

    Attributes:
        impls: names, in the order of their turns.
        setup: the candidate for a point and a name.
        expected: the oracle's result in float64, or None where the baseline stands for it.
    """

    impls: tuple[str, ...]
    setup: Callable[[Point, str], Candidate]
    expected: Callable[[Point], Tensor | None] = lambda point: None

    def rows_at(
        self, point: Point, options: Options, on_round: Callable[[], None]
    ) -> list[dict[str, Value]]:
        """Check, then time, all candidates of one point."""
        candidates = {impl: self.setup(point, impl) for impl in self.impls}
        self._check(candidates, point)
        timings = measure(
            candidates, rounds=options.rounds, seconds=options.seconds, on_round=on_round
        )
        baseline = timings[self.impls[0]]
        return [
            {**point, "impl": impl, **figures(timings[impl], baseline, candidate)}
            for impl, candidate in candidates.items()
        ]

    def _check(self, candidates: dict[str, Candidate], point: Point) -> None:
        results = {}
        for impl, candidate in candidates.items():
            candidate.before()
            result = candidate.run()
            if result is not None:
                results[impl] = result.clone()
            candidate.after()
        if results:
            tolerance = TOLERANCES[str(point.get("dtype", "float32"))]
            gate(results, expected=self.expected(point), tolerance=tolerance, point=point)


def figures(timing: Timing, baseline: Timing, candidate: Candidate) -> dict[str, Value]:
    """The columns of one timed candidate."""
    wall = spread(timing.wall)
    return {
        "median_ms": 1e3 * wall.median,
        "p20_ms": 1e3 * wall.p20,
        "p80_ms": 1e3 * wall.p80,
        "cpu_ms": 1e3 * spread(timing.cpu).median,
        "speedup": paired_ratio(baseline.wall, timing.wall),
        "cpu_speedup": paired_ratio(baseline.cpu, timing.cpu),
        "bytes": candidate.num_bytes,
        "flops": candidate.num_flops,
        "rounds": len(timing.wall),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KEY=VALUE", help="points that have all of these"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (21, quick: 9)")
    parser.add_argument("--out", type=Path, default=Options.out, help="folder for CSV and JSON")
    return parser


def options_from(arguments: argparse.Namespace) -> Options:
    """Options of parsed arguments; sets PyTorch's number of threads."""
    torch.set_num_threads(arguments.threads)
    return Options(
        quick=arguments.quick,
        only=tuple(arguments.only),
        rounds=arguments.rounds or (9 if arguments.quick else 21),
        seconds=20.0 if arguments.quick else 60.0,
        out=arguments.out,
    )


def run(benchmark: Benchmark, options: Options, console: Console) -> int:
    """Measure every wanted point, print the table, write the files; how many points there were."""
    points = [point for point in benchmark.points(options.quick) if options.wants(point)]
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(benchmark.name, total=len(points) * benchmark.steps(options))
        for index, point in enumerate(points):
            progress.update(task, description=f"{benchmark.name} {label(point)}")
            rows += benchmark.rows_at(point, options, lambda: progress.advance(task))
            progress.update(task, completed=(index + 1) * benchmark.steps(options))
    if rows:
        show(benchmark.title, rows, benchmark.hidden, console)
        csv_path, json_path = write(benchmark.name, rows, options.out)
        console.print(f"{benchmark.name}: {csv_path}, {json_path.name}", soft_wrap=True)
    return len(points)


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """The command line of one benchmark; the exit status."""
    options = options_from(parser(benchmark.title).parse_args(argv))
    try:
        count = run(benchmark, options, terminal())
    except GateError as error:
        print(f"{benchmark.name}: failed: {error}", file=sys.stderr)
        return 1
    if count == 0:
        print(f"{benchmark.name}: failed: no point has {' '.join(options.only)}", file=sys.stderr)
        return 2
    return 0
