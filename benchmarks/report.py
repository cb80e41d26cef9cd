"""Rows with their environment: a table on the terminal, CSV and JSON under out/bench."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

import mla

ROOT = Path(__file__).resolve().parent.parent
Value = int | float | str | None
Row = Mapping[str, Value]


@lru_cache
def environment() -> dict[str, Value]:
    """What the numbers depend on besides the code."""
    return {
        "device": device_name(),
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


def write(name: str, rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """``name.csv``, where every row carries the environment, and ``name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, json_path = folder / f"{name}.csv", folder / f"{name}.json"
    full = [{"benchmark": name, **row, **environment()} for row in rows]
    columns = list(dict.fromkeys(key for row in full for key in row))
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(full)
    document = {"benchmark": name, "environment": environment(), "rows": list(rows)}
    json_path.write_text(json.dumps(document, indent=1) + "\n")
    return csv_path, json_path


def terminal() -> Console:
    """Standard output, wide enough for a table where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def show(title: str, rows: Sequence[Row], hidden: Sequence[str], console: Console) -> None:
    """Print the columns that are not hidden."""
    columns = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in hidden]
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = all(isinstance(row.get(column), str) for row in rows)
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
