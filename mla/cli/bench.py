"""Time this machine: every benchmark, or those that are named, each candidate checked first.

One table each; rows go to CSV and JSON files as they are measured, and a run that was cut off goes
on where it stopped. `--compare BASE` asks instead whether this tree is slower than a version that
git knows. The benchmarks are part of a checkout, not of an installed package.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

import mla
from mla.cli.console import CommandError, require

ROOT = Path(mla.__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmarks.run`, which explains them at length."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and end")
    parser.add_argument("--compare", metavar="BASE", help="against a version: main~3, a tag")
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
    parser.add_argument("--threads", type=int, help="of PyTorch (default: 2)")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (21, quick: 9)")
    parser.add_argument("--out", type=Path, help="folder for CSV and JSON (default: out/bench)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--price-per-hour", type=float, help="of the machine: cost of a token")


def run(options: argparse.Namespace) -> int:
    if not (ROOT / "benchmarks" / "run.py").is_file():
        raise CommandError(
            "bench: the installed package has no benchmarks; run it in a checkout of the project, "
            "after `make env`"
        )
    require("rich")
    sys.path.insert(0, str(ROOT))  # a checkout that is not the current folder
    command = importlib.import_module(
        "benchmarks.run" if options.compare is None else "benchmarks.compare"
    )
    if options.list:
        for name, benchmark in importlib.import_module("benchmarks.run").all_benchmarks().items():
            print(f"{name:16} {benchmark.title}")
        return 0
    status: int = command.main(_arguments(options))
    return status


def _arguments(options: argparse.Namespace) -> list[str]:
    """As they are typed for `benchmarks.run`, or for `benchmarks.compare`."""
    found = [*([] if options.compare is None else [options.compare]), *options.names]
    for name in ("quick", "fresh"):
        found += [f"--{name}"] * getattr(options, name)
    for name in ("only", "dtype"):
        values = getattr(options, name)
        found += [f"--{name}", *values] if values else []
    for name in ("threads", "rounds", "out", "price_per_hour"):
        value = getattr(options, name)
        found += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return found
