"""What the commands share: plain tables, one-line errors, progress bars, devices and dtypes.

Tables are plain text, because `info` and `check` work with torch alone; progress bars need rich.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EXTRA_OF = {
    "transformers": "transformers",
    "safetensors": "transformers",
    "rich": "transformers",
    "triton": "triton",
    "matplotlib": "bench",
}


class CommandError(ValueError):
    """A command cannot do what was asked; the message is one line."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, indent: int = 2) -> str:
    """Columns of text, numbers to the right and words to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    is_number = [
        bool(cells) and all(row[i] == "-" or row[i][:1].isdigit() for row in cells)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        return " " * indent + "  ".join(parts).rstrip()

    rule = " " * indent + "  ".join("-" * width for width in widths)
    return "\n".join([line(list(header)), rule, *map(line, cells)])


def require(*modules: str) -> None:
    """Raise the one line that mends it where an optional package is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise CommandError(
                f"{module} is not installed; pip install 'mla[{EXTRA_OF[module]}]' brings it"
            )


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def device_of(name: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device of that name, if this machine has it and it computes in ``dtype``."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=dtype).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).split("\n", 1)[0]
        raise CommandError(f"--device has value {name!r}, which cannot be used: {first}") from None
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and the bars of transformers: the commands say what matters."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def progress() -> Iterator[Any]:
    """Bars on stderr, so that stdout can be piped."""
    require("rich")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield bars
