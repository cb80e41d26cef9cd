"""A benchmark as data, and its command line: ``python -m benchmarks.bench_NAME --quick``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from benchmarks import ceilings
from benchmarks.harness import (
    OUT_OF_MEMORY,
    Candidate,
    GateError,
    Point,
    Timing,
    gate,
    is_out_of_memory,
    label,
    measure,
    paired_ratio,
    release_memory,
    spread,
)
from benchmarks.report import ROOT, Row, Value, show, terminal
from benchmarks.resume import Effort, Journal

# Largest error of the baseline against the float64 oracle, relative to the largest value.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line chose; ``measure`` is how a comparison times its candidates."""

    quick: bool = False
    only: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    rounds: int = 21
    seconds: float = 60.0
    out: Path = ROOT / "out" / "bench"
    fresh: bool = False
    price_per_hour: float | None = None
    measure: Callable[..., dict[str, Timing]] = measure

    def wants(self, point: Point, name: str = "") -> bool:
        """Whether a point of benchmark ``name`` passes the filters.

        Of the ``key=value`` of ``only`` the point has one for each key; of its plain words, if
        there are any, one is the name or a value of the point. A point without dtype has none of
        those asked for.
        """
        values = {name, *map(str, point.values())}
        wanted: dict[str, set[str]] = {}
        for word in self.only:
            key, is_pair, value = word.partition("=")
            wanted.setdefault(key if is_pair else "", set()).add(value if is_pair else word)
        words = wanted.pop("", set())
        return (
            all(str(point.get(key)) in found for key, found in wanted.items())
            and (not words or bool(words & values))
            and (not self.dtypes or point.get("dtype") in self.dtypes)
        )

    def filters(self) -> str:
        """As they were typed, for messages."""
        return " ".join((*self.only, *self.dtypes))


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
        reason_absent: why it cannot run here, or None.
        is_long: left out of a quick run of everything; a quick run by name has it.
    """

    name: str
    title: str
    points: Callable[[bool], Sequence[Point]]
    rows_at: Callable[[Point, Options, Callable[[], None]], list[Row]]
    steps: Callable[[Options], int] = lambda options: options.rounds
    hidden: tuple[str, ...] = ()
    reason_absent: Callable[[], str | None] = lambda: None
    is_long: bool = False


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
        """Check, then time, all candidates of one point; those without memory get no figures."""
        candidates = self._ready(point)
        self._check(candidates, point)
        timings = options.measure(
            candidates, rounds=options.rounds, seconds=options.seconds, on_round=on_round
        )
        baseline = timings.get(self.impls[0], Timing())
        rows: list[dict[str, Value]] = []
        for impl in self.impls:
            status = "ok" if impl in timings else OUT_OF_MEMORY
            found = figures(
                timings.get(impl, Timing()), baseline, candidates.get(impl, _NO_CANDIDATE)
            )
            rows.append({**point, "impl": impl, "status": status, **found})
        return rows

    def _ready(self, point: Point) -> dict[str, Candidate]:
        """The candidates that fit into memory."""
        found = {}
        for impl in self.impls:
            candidate = _unless_out_of_memory(partial(self.setup, point, impl))
            if candidate is not None:
                found[impl] = candidate
        return found

    def _check(self, candidates: dict[str, Candidate], point: Point) -> None:
        """Hold the results against the oracle; drop candidates that run out of memory."""

        def result_of(candidate: Candidate) -> list[Tensor]:
            candidate.before()
            result = candidate.run()
            copies = [] if result is None else [result.clone()]
            candidate.after()
            return copies

        results = {}
        for impl, candidate in list(candidates.items()):
            found = _unless_out_of_memory(partial(result_of, candidate))
            if found is None:
                del candidates[impl]
            elif found:
                results[impl] = found[0]
        if results:
            tolerance = TOLERANCES[str(point.get("dtype", "float32"))]
            gate(results, expected=self.expected(point), tolerance=tolerance, point=point)


_NO_CANDIDATE = Candidate(run=lambda: None)
T = TypeVar("T")


def _unless_out_of_memory(call: Callable[[], T]) -> T | None:
    """What ``call`` gives; None where memory does not suffice."""
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory()  # the traceback, which held tensors, has gone with the block above
    return None


def figures(timing: Timing, baseline: Timing, candidate: Candidate) -> dict[str, Value]:
    """The columns of one timed candidate; NaN where it, or what it is compared with, has no time.

    NaN passes through the arithmetic of a benchmark's own columns; `run` writes it as nothing.
    """
    wall, cpu = spread(timing.wall), spread(timing.cpu)
    return {
        "median_ms": 1e3 * wall.median,
        "p20_ms": 1e3 * wall.p20,
        "p80_ms": 1e3 * wall.p80,
        "cpu_ms": 1e3 * cpu.median,
        "speedup": paired_ratio(baseline.wall, timing.wall),
        "cpu_speedup": paired_ratio(baseline.cpu, timing.cpu),
        "bytes": candidate.num_bytes,
        "flops": candidate.num_flops,
        "rounds": len(timing.wall),
    }


DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has; `mla.cli.bench` offers the same."""
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="points with these KEY=VALUE, or this benchmark, or this value: decode S=8192",
    )
    parser.add_argument(
        "--dtype", nargs="+", default=[], metavar="DTYPE", help="points in one of these: bf16"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (21, quick: 9)")
    parser.add_argument("--out", type=Path, default=Options.out, help="folder for CSV and JSON")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument(
        "--price-per-hour", type=float, help="of this machine, for the cost of a token"
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(found)
    return found


def options_from(arguments: argparse.Namespace) -> Options:
    """Options of parsed arguments; sets PyTorch's number of threads."""
    torch.set_num_threads(arguments.threads)
    return Options(
        quick=arguments.quick,
        only=tuple(arguments.only),
        dtypes=tuple(DTYPE_NAMES.get(name, name) for name in arguments.dtype),
        rounds=arguments.rounds or (9 if arguments.quick else 21),
        seconds=4.0 if arguments.quick else 60.0,
        out=arguments.out,
        fresh=arguments.fresh,
        price_per_hour=arguments.price_per_hour,
    )


class Count(NamedTuple):
    """Points of a run; ``kept`` are those that an earlier run had measured."""

    measured: int = 0
    kept: int = 0
    failed: int = 0  # of ``measured``: rows without memory

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def all(self) -> int:
        return self.measured + self.kept


def run(benchmark: Benchmark, options: Options, console: Console) -> Count:
    """Measure every wanted point that no earlier run has, print the table, write the files.

    Files are written after each point. A point that runs out of memory gets a row that says so.
    """
    name = benchmark.name
    reason = benchmark.reason_absent()
    points = [point for point in benchmark.points(options.quick) if options.wants(point, name)]
    if not points:
        return Count()
    if reason is not None:
        console.print(f"{name}: skipped: {reason}", soft_wrap=True)
        return Count()
    effort = Effort(options.quick, options.rounds, options.price_per_hour)
    journal = Journal(name, options.out, effort, fresh=options.fresh)
    missing = [point for point in points if journal.rows_of(point) is None]
    kept = len(points) - len(missing)
    if kept:
        console.print(
            f"{name}: {kept} of {len(points)} points are there from an earlier run of the same "
            "code on this machine; --fresh measures them again",
            soft_wrap=True,
        )
    failed = 0
    with progress_bar() as progress:
        task = progress.add_task(name, total=len(missing) * benchmark.steps(options))
        for index, point in enumerate(missing):
            progress.update(task, description=f"{name} {label(point)}")
            rows = _rows_at(benchmark, point, options, lambda: progress.advance(task))
            failed += any(row.get("status") == OUT_OF_MEMORY for row in rows)
            journal.add(point, rows, ceilings.measured())
            progress.update(task, completed=(index + 1) * benchmark.steps(options))
    rows = [row for point in points for row in journal.rows_of(point) or ()]
    if rows:
        show(benchmark.title, rows, benchmark.hidden, console)
        csv_path, json_path = journal.paths
        console.print(f"{name}: {csv_path}, {json_path.name}", soft_wrap=True)
    return Count(len(missing), kept, failed)


def progress_bar() -> Progress:
    """A bar with the time left, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _rows_at(
    benchmark: Benchmark, point: Point, options: Options, on_round: Callable[[], None]
) -> list[Row]:
    """Rows with their share of the limit, or one that says that memory did not suffice."""
    rows = _unless_out_of_memory(lambda: benchmark.rows_at(point, options, on_round))
    if rows is None:
        return [{**point, "status": OUT_OF_MEMORY}]
    return [_without_nan({**row, **ceilings.share_of_limit(row)}) for row in rows]


def _without_nan(row: Row) -> Row:
    return {
        key: None if isinstance(value, float) and value != value else value
        for key, value in row.items()
    }


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """The command line of one benchmark; the exit status."""
    options = options_from(parser(benchmark.title).parse_args(argv))
    reason = benchmark.reason_absent()
    if reason is not None:
        print(f"{benchmark.name}: failed: {reason}", file=sys.stderr)
        return 2
    try:
        count = run(benchmark, options, terminal())
    except GateError as error:
        print(f"{benchmark.name}: failed: {error}", file=sys.stderr)
        return 1
    if count.all == 0:
        print(f"{benchmark.name}: failed: no point has {options.filters()}", file=sys.stderr)
        return 2
    return 0
