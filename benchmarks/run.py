"""Run benchmarks: ``python -m benchmarks.run --quick`` or ``python -m benchmarks.run layer cache``.

One table each, and CSV and JSON under out/bench. Exit status 1 if a candidate was refused by its
correctness gate, 2 if there is nothing to run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import GateError
from benchmarks.report import terminal
from benchmarks.sweep import Benchmark, options_from, parser, run


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
    parsed = arguments.parse_args(argv)
    unknown = set(parsed.names) - set(benchmarks)
    if unknown:
        print(f"bench: failed: no benchmark {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    options, console = options_from(parsed), terminal()
    refused, count = 0, 0
    for name, benchmark in benchmarks.items():
        if parsed.names and name not in parsed.names:
            continue
        try:
            count += run(benchmark, options, console)
        except GateError as error:
            print(f"{name}: failed: {error}", file=sys.stderr)
            refused += 1
    if count == 0 and not refused:
        print(f"bench: failed: no point has {' '.join(options.only)}", file=sys.stderr)
        return 2
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
