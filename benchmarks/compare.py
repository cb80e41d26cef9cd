"""Is this tree slower than an older version? ``python -m benchmarks.compare BASE --quick``.

Two processes, one for each version, hold the same case with the same inputs and take turns, round
by round, so that load meets both. The benchmarks are those of this tree for both versions.

A round gives one ratio, time here over time in BASE: processor time of the busiest thread, or wall
time where there is a GPU. The interval is that of a sign test: between which of the sorted ratios
the median lies with 99 % confidence, whatever their distribution.

    slower   the interval lies above 1.05, and again in a second pair of processes
    faster   it lies below 1 / 1.05
    same     it lies between the two
    unclear  none of these; more rounds narrow it

The second pair is asked because two processes of the same code can differ for as long as they
live, by where their memory lies. Exit status 1 if a case is slower, or fails here and not in BASE.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from math import comb
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console

from benchmarks.compare_pair import Pair, Rounds, WorkerError
from benchmarks.compare_tree import TreeError, export, resolve
from benchmarks.harness import Point, label
from benchmarks.report import ROOT, Row, commit, show, terminal, write
from benchmarks.run import all_benchmarks
from benchmarks.sweep import Benchmark, Options, options_from, parser, progress_bar

CONFIDENCE, TOLERANCE = 0.99, 0.05
FAILS = "fails here"
ROUNDS, QUICK_ROUNDS = 25, 15


class Ratio(NamedTuple):
    """Median of time here over time in BASE, and its interval."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1 + TOLERANCE:
            return "slower"
        if self.high < 1 / (1 + TOLERANCE):
            return "faster"
        is_same = self.low >= 1 / (1 + TOLERANCE) and self.high <= 1 + TOLERANCE
        return "same" if is_same else "unclear"


def ratio_of(rounds: Rounds) -> Ratio:
    """Sign-test interval of the median; from nothing to infinity below 8 rounds."""
    ratios = sorted(here / base for base, here in rounds)
    n = len(ratios)
    # Largest k with P(fewer than k of n ratios lie below the median) <= (1 - CONFIDENCE) / 2.
    tail, k = 0.0, 0
    while k < n and (tail := tail + comb(n, k) / 2**n) <= (1 - CONFIDENCE) / 2:
        k += 1
    low, high = (ratios[k - 1], ratios[n - k]) if k else (0.0, float("inf"))
    return Ratio(median(ratios), low, high)


class Case(NamedTuple):
    """One point of one benchmark."""

    benchmark: Benchmark
    point: Point


def cases(names: Sequence[str], options: Options) -> list[Case]:
    """Those that time candidates and pass the filters."""
    found = []
    for name, benchmark in all_benchmarks().items():
        module = import_module(f"benchmarks.bench_{name}")
        if (names and name not in names) or not hasattr(module, "Comparison"):
            continue
        if benchmark.reason_absent() is None:
            points = benchmark.points(options.quick)
            found += [Case(benchmark, x) for x in points if options.wants(x, name)]
    return found


def compare(base: Path, here: Path, chosen: Sequence[Case], options: Options) -> list[Row]:
    """A row for each candidate of each case; those that seem slower are measured twice."""
    with progress_bar() as progress:
        task = progress.add_task("compare", total=len(chosen))

        def measured(some: Sequence[Case]) -> list[list[Row]]:
            found = []
            with Pair(base, here, options) as pair:
                for case in some:
                    where = f"{case.benchmark.name} {label(case.point)}"
                    progress.update(task, description=f"compare {where}")
                    found.append(_rows(pair, case))
                    progress.advance(task)
            return found

        first = measured(chosen)
        doubted = [i for i, rows in enumerate(first) if any(map(_is_slower, rows))]
        if doubted:
            progress.update(task, total=len(chosen) + len(doubted))
            again = measured([chosen[i] for i in doubted])
            for i, second in zip(doubted, again, strict=True):
                first[i] = [_confirmed(row, second) for row in first[i]]
    return [row for rows in first for row in rows]


def _rows(pair: Pair, case: Case) -> list[Row]:
    """One row a candidate; one without candidate where a version cannot run the case."""
    found = pair.measure(case.benchmark.name, case.point, lambda: None)
    place = {"case": f"{case.benchmark.name} {label(case.point)}"}
    rows: list[Row] = []
    for impl, rounds in found.rounds.items():
        ratio = ratio_of(rounds)
        base, here = (1e3 * median(x[i] for x in rounds) for i in (0, 1))
        rows.append(
            {
                **place,
                "impl": impl,
                "base_ms": base,
                "here_ms": here,
                "ratio": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "rounds": len(rounds),
                "verdict": ratio.verdict,
            }
        )
    if found.error_here is not None and found.error_base is None:
        return [{**place, "verdict": FAILS, "error": found.error_here}]
    if found.error_here is not None:
        return [{**place, "verdict": "fails in both", "error": found.error_here}]
    if found.error_base is not None:
        return [{**place, "verdict": "not in BASE", "error": found.error_base}]
    rows += [{**place, "impl": impl, "verdict": "not here"} for impl in found.only_base]
    rows += [{**place, "impl": impl, "verdict": "not in BASE"} for impl in found.only_here]
    return rows


def _is_slower(row: Row) -> bool:
    return row["verdict"] == "slower"


def _confirmed(row: Row, second: Sequence[Row]) -> Row:
    """A slower row that a second pair of processes does not find slower is unclear."""
    again = [other for other in second if other.get("impl") == row.get("impl")]
    if not _is_slower(row):
        return row
    verdict = "slower" if any(map(_is_slower, again)) else "unclear"
    return {**row, "verdict": verdict, "second_ratio": again[0].get("ratio") if again else None}


def report(rows: Sequence[Row], base: str, options: Options, console: Console) -> int:
    """The table, the files, and the last line; the exit status."""
    show(f"Time here over time in {base}, 99 % interval", rows, ("error",), console)
    for row in rows:
        if row.get("error"):
            console.print(f"{row['case']}: {row['verdict']}: {row['error']}", soft_wrap=True)
    csv_path, _ = write("compare", rows, options.out)
    bad = [row for row in rows if row["verdict"] in ("slower", FAILS)]
    unclear = sum(row["verdict"] == "unclear" for row in rows)
    more = f", {unclear} unclear" if unclear else ""
    summary = f"{len(bad)} of {len(rows)} slower than {base}{more}; rows in {csv_path}"
    console.print(f"bench-compare: {'failed' if bad else 'passed'}, {summary}", soft_wrap=True)
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("base", metavar="BASE", help="a version that git knows: main~3, a tag")
    arguments.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
    parsed = arguments.parse_intermixed_args(argv)
    rounds = parsed.rounds or (QUICK_ROUNDS if parsed.quick else ROUNDS)
    options = replace(options_from(parsed), rounds=rounds)
    console = terminal()
    chosen = cases(parsed.names, options)
    if not chosen:
        words = " ".join((*parsed.names, options.filters())).strip()
        print(f"bench-compare: failed: no timed case has {words}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="mla-compare-") as folder:
            base = Path(folder) / "base"
            kernels = export(parsed.base, root, base)
            name = f"{parsed.base} ({resolve(parsed.base, root)[:12]})"
            console.print(f"bench-compare: {commit()} against {name}, {kernels}", soft_wrap=True)
            rows = compare(base, root, chosen, options)
    except (TreeError, WorkerError) as error:
        print(f"bench-compare: failed: {error}", file=sys.stderr)
        return 2
    return report(rows, name, options, console)


if __name__ == "__main__":
    raise SystemExit(main())
