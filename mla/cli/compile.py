"""Compile the promised Triton kernels for every target, without a GPU, and say what they take.

Each line is one kernel on one target: shared memory and the target's limit, registers of a thread,
spilled bytes, the kind of matrix instruction. A first run takes minutes; Triton keeps the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mla.cli.console import CommandError, one_line, progress, require, table

if TYPE_CHECKING:
    from mla.kernels.variant_types import Variant
    from mla.kernels.variants import Report

ARCHITECTURES = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950")
FAMILIES = ("decode", "append", "merge", "rotate", "prefill", "expand")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--only", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    require("triton")
    from mla.kernels import launch
    from mla.kernels.variants import variants

    if launch.is_interpreting():
        raise CommandError("compile: the interpreter cannot compile; unset TRITON_INTERPRET")
    chosen = [
        variant
        for variant in variants()
        if variant.architecture in (options.arch or ARCHITECTURES)
        and variant.family in (options.only or FAMILIES)
    ]
    with _bar(len(chosen)) as advance:
        rows = [_compile(variant, advance) for variant in chosen]
    failed = sum(not row["passed"] for row in rows)
    if options.json:
        print(json.dumps(_document(rows), indent=2))
    else:
        header = ("target", "kernel", "warps", "stages", "shared", "limit", "regs", "spills", "MMA")
        print(table((*header, "result"), [_cells(row) for row in rows]))
        print(_conclusion(len(rows), failed))
    return 1 if failed else 0


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal where rich is installed; otherwise nothing."""
    try:
        require("rich")
    except CommandError:
        yield lambda text: None
        return
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with progress() as bars:
        task = bars.add_task("compile", total=total)
        yield lambda text: bars.update(task, advance=1, description=text)


def _compile(variant: Variant, advance: Callable[[str], None]) -> dict[str, Any]:
    """One row of the table, as plain data."""
    from mla.kernels.variants import compile_variant

    report: Report | None = None
    try:
        report = compile_variant(variant)
        complaints = report.complaints(variant)
    except Exception as error:  # whatever the compiler raises is a result
        complaints = [f"{type(error).__name__}: {one_line(error)}"]
    advance(f"{variant.architecture} {variant.family}")
    return {
        "target": variant.architecture,
        "kernel": variant.name,
        "warps": variant.num_warps,
        "stages": variant.num_stages,
        **(report._asdict() if report is not None else {}),
        "spill_bytes_allowed": variant.spill_bytes,
        "spill_reason": variant.reason,
        "passed": not complaints,
        "complaints": complaints,
    }


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import triton

    return {
        "triton": triton.__version__,
        "passed": all(row["passed"] for row in rows),
        "variants": rows,
    }


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    keys = ("shared", "shared_limit", "registers", "spill_bytes", "mma")
    figures = (row.get(key, "-") for key in keys)
    result = row["spill_reason"] if row["passed"] else "FAILED: " + "; ".join(row["complaints"])
    return row["target"], row["kernel"], row["warps"], row["stages"], *figures, result or "ok"


def _conclusion(count: int, failed: int) -> str:
    import triton

    outcome = f"failed, {failed} of" if failed else "passed,"
    return f"compile: {outcome} {count} kernels with Triton {triton.__version__}"
