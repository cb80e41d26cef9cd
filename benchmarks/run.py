"""Run benchmarks: ``python -m benchmarks.run --quick`` or ``python -m benchmarks.run layer cache``.

One table each, and CSV and JSON under out/bench. Exit status 1 if a candidate was refused by its
correctness gate, 2 if there is nothing to run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks import ceilings
from benchmarks.harness import GateError
from benchmarks.report import terminal, write
from benchmarks.sweep import Benchmark, Count, Options, options_from, parser, run


def all_benchmarks() -> dict[str, Benchmark]:
    """Every ``bench_*.py`` beside this file, by the name of its files."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    found = [import_module(f"benchmarks.{file.stem}").BENCHMARK for file in files]
    return {benchmark.name: benchmark for benchmark in found}


def main(argv: Sequence[str] | None = None) -> int:
    benchmarks = all_benchmarks()
    arguments = parser(__doc__)
    arguments.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(benchmarks)} (default: all)"
    )
    parsed = arguments.parse_intermixed_args(argv)
    unknown = set(parsed.names) - set(benchmarks)
    if unknown:
        print(f"bench: failed: no benchmark {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    options, console = options_from(parsed), terminal()
    names = parsed.names or list(benchmarks)
    if options.quick and not parsed.names and not options.filters():
        names = [name for name in benchmarks if not benchmarks[name].is_long]
    refused, count = [], Count()
    for name, benchmark in benchmarks.items():
        if name not in names:
            continue
        try:
            count += run(benchmark, options, console)
        except GateError as error:
            print(f"{name}: failed: {error}", file=sys.stderr)
            refused.append(name)
    show_ceilings(options, console)
    if refused:
        print(f"bench: failed: wrong results in {', '.join(refused)}", file=sys.stderr)
        return 1
    if count.all == 0:
        print(f"bench: failed: no point has {options.filters()}", file=sys.stderr)
        return 2
    left_out = sorted({*benchmarks} - {*names}) if not parsed.names else []
    if left_out:
        text = f"left out of a quick run, each runs by its name: {', '.join(left_out)}"
        console.print(f"bench: {text}", soft_wrap=True)
    console.print(f"bench: passed, {_summary(count)}; rows in {options.out}", soft_wrap=True)
    return 0


def show_ceilings(options: Options, console: Console) -> None:
    """What the shares are of: to ``ceilings.csv`` and ``.json``, and in one line."""
    found = ceilings.measured()
    if found:
        write(
            "ceilings",
            [{"ceiling": name, "per_second": x} for name, x in found.items()],
            options.out,
        )
        values = ", ".join(f"{name} {x / 1e9:.0f}" for name, x in found.items())
        console.print(f"ceilings, 1e9 bytes or flops a second: {values}", soft_wrap=True)


def _summary(count: Count) -> str:
    parts = [f"{count.measured} points measured"]
    if count.kept:
        parts.append(f"{count.kept} kept")
    if count.failed:
        parts.append(f"{count.failed} without enough memory")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
