"""``python -m benchmarks.check_plan``: what `mla.plan` predicts beside what was measured.

Every row of attention that the plan can use, of every device that has rows:

    bound      from the limits alone; measured / bound is how far the kernel is from them
    predicted  bound / share, with the share of the nearest *other* row of the same heads, codec,
               dtype and bound, as the plan does for sizes that were not measured
    error      predicted / measured - 1

Rows of a processor that carry no bound of its memory get one from ``--bandwidth``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.report import ROOT, Row, show, terminal
from mla.cli.console import DTYPES
from mla.cli.options import quantity
from mla.codec import codec_from_spec
from mla.config import MLAConfig
from mla.plan import bytes_per_token
from mla.plan.devices import DEVICES, given_device
from mla.plan.measured import Measured, closest, read_rows, shares

RESULTS = ROOT / "benchmarks" / "results"
LAYER = MLAConfig.preset("deepseek-v3")  # C and R are those of the benchmarks


def with_memory(one: Measured, bytes_per_second: float | None) -> Measured:
    """The same call against the larger of its bounds."""
    if bytes_per_second is None or one.benchmark != "cpu":
        return one
    row = bytes_per_token(LAYER, codec_from_spec(one.codec), dtype=DTYPES[one.dtype])
    seconds = one.B * one.S * row / bytes_per_second
    if seconds <= one.share * one.seconds:
        return one
    return one._replace(share=seconds / one.seconds, bound="memory")


def compare(measured: Sequence[Measured]) -> list[Row]:
    """One row for each call; ``predicted_ms`` is empty where no other is like it."""
    rows: list[Row] = []
    for one in measured:
        others = [other for other in measured if other is not one and other.kind == one.kind]
        other = closest(others, one.B * one.S)
        predicted = None if other is None else one.share * one.seconds / other.share
        rows.append(
            {
                "device": one.device,
                "dtype": one.dtype,
                "codec": one.codec,
                "H": one.H,
                "B": one.B,
                "S": one.S,
                "measured_ms": 1e3 * one.seconds,
                "bound_ms": 1e3 * one.share * one.seconds,
                "bound_by": one.bound,
                "measured_over_bound": 1 / one.share,
                "predicted_ms": None if predicted is None else 1e3 * predicted,
                "from_S": None if other is None else other.S,
                "error": None if predicted is None else predicted / one.seconds - 1,
            }
        )
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The errors in two sentences."""
    ratios = [float(row["measured_over_bound"] or 0) for row in rows]
    errors = [float(row["error"]) for row in rows if row["error"] is not None]
    text = (
        f"Measured time is {min(ratios):.2f} to {max(ratios):.2f} times the bound, "
        f"median {median(ratios):.2f}, over {len(rows)} calls."
    )
    if errors:
        text += (
            f" From the nearest other row: error {min(errors):+.0%} to {max(errors):+.0%}, "
            f"median size {median(map(abs, errors)):.0%}, over {len(errors)} calls."
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder with CSV")
    parser.add_argument("--least", type=int, default=0, metavar="S", help="cached tokens or more")
    parser.add_argument(
        "--bandwidth", type=quantity, help="of the processor's memory, bytes a second: 40G"
    )
    options = parser.parse_args(argv)
    found = read_rows(options.rows)
    cpu = given_device("cpu", memory=1.0, bytes_per_second=1.0, flops_per_second=1.0)
    rows: list[Row] = []
    for device in (cpu, *DEVICES.values()):
        measured = [with_memory(one, options.bandwidth) for one in shares(found, device)]
        rows += compare([one for one in measured if options.least <= one.S])
    if not rows:
        print(f"check_plan: failed: {options.rows} has no rows to compare with", file=sys.stderr)
        return 2
    console = terminal()
    show("The plan's bound and prediction beside measured rows", rows, ("device",), console)
    console.print(summary(rows), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
