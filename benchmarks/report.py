"""Rows with their environment: a table on the terminal, CSV and JSON under out/bench."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

import mla

ROOT = Path(__file__).resolve().parent.parent
Value = int | float | str | None
Row = Mapping[str, Value]
HIDDEN = ("limit_ms", "bound", "status")  # for the files, unless a table needs them


@lru_cache
def environment() -> dict[str, Value]:
    """What the numbers depend on besides the code."""
    return {
        "device": device_name(),
        "driver": driver(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "mla": mla.__version__,
        "commit": commit(),
    }


def device_name() -> str:
    """Of the accelerator, or the processor as the kernel names it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def driver() -> str:
    """Version of the accelerator's driver, ``none`` without one."""
    if not torch.cuda.is_available():
        return "none"
    if torch.version.hip:
        version_file = Path("/sys/module/amdgpu/version")
        return version_file.read_text().strip() if version_file.is_file() else "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()


def commit() -> str:
    """Of the checkout, with ``-dirty`` when tracked files were changed; ``unknown`` without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def with_environment(rows: Sequence[Row]) -> list[Row]:
    """Every row with what it depends on; a row that an earlier run measured keeps its own."""
    return [row if "commit" in row else {**row, **environment()} for row in rows]


def write(
    name: str, rows: Sequence[Row], folder: Path, more: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """``name.csv``, where every row carries the environment, and ``name.json``.

    Both are replaced whole, so that a run that is killed leaves the rows so far.

    Args:
        more: further entries of the JSON document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, json_path = folder / f"{name}.csv", folder / f"{name}.json"
    full = [{"benchmark": name, **row} for row in with_environment(rows)]
    columns = list(dict.fromkeys(key for row in full for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["benchmark"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(full)
    document = {"benchmark": name, "environment": environment(), "rows": full, **(more or {})}
    _replace(csv_path, text.getvalue())
    _replace(json_path, json.dumps(document, indent=1) + "\n")
    return csv_path, json_path


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, newline="")
    partial.replace(path)


def terminal() -> Console:
    """Standard output, wide enough for a table where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def show(title: str, rows: Sequence[Row], hidden: Sequence[str], console: Console) -> None:
    """Print the columns that are not hidden, and the status where a row has another than ``ok``."""
    without = {*hidden, *HIDDEN, *environment()}
    if any(row.get("status", "ok") != "ok" for row in rows):
        without -= {"status"}
    columns = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in without]
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = all(isinstance(row.get(column, ""), str) for row in rows)
        justify: Literal["left", "right"] = "left" if is_text else "right"
        table.add_column(column.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else _whole(value)


def _whole(value: Value) -> str:
    return f"{value:,.0f}" if isinstance(value, float | int) else str(value)
