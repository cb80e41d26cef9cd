"""Perplexity of a model on a text, with a confidence interval; with --against, of two models.

The text is cut into windows from its start; windows differ more than models do, so two models are
compared by the differences on the same tokens. With --codec a converted model attends to rows as
an 8- or 4-bit cache would give them back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.cli.console import DTYPES, CommandError, device_of, progress
from mla.cli.convert import bar
from mla.cli.generate import load_any
from mla.cli.models import (
    go_offline,
    is_converted,
    load_model,
    load_tokenizer,
    read_config,
    read_text,
)
from mla.cli.options import at_least_two, codec, positive

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom.
STUDENT_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="to be read")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another model, such as the original"
    )
    parser.add_argument("--windows", type=positive, default=8, help="default: 8")
    parser.add_argument("--window", type=at_least_two, default=1024, help="tokens in each")
    parser.add_argument("--codec", type=codec, metavar="NAME", help="fp8, int8 or int4 rows")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(options: argparse.Namespace) -> int:
    go_offline()
    from mla.convert.evaluate import compare_losses, token_windows

    device = device_of(options.device)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    folders = [options.model] + ([] if options.against is None else [options.against])
    configs = [read_config(folder) for folder in folders]
    if options.codec is not None and not is_converted(configs[0]):
        raise CommandError(f"--codec needs a converted model, and {options.model} is another")
    text = read_text(options.text)
    windows = token_windows(
        load_tokenizer(options.model), text, count=options.windows, length=options.window
    )
    if options.against is not None:
        _check_same_tokens(options, text, windows)
    found: list[Tensor] = []
    with progress() as bars:
        for index, folder in enumerate(folders):
            model = _load(folder, device, dtype)
            rows = options.codec if index == 0 else None
            found.append(_losses(bars, model, windows, rows, str(folder)))
    report = {
        "text": str(options.text),
        "windows": options.windows,
        "window": options.window,
        "codec": None if options.codec is None else options.codec.spec,
        "models": {str(folder): _interval(x) for folder, x in zip(folders, found, strict=True)},
    }
    for folder, losses in zip(folders, found, strict=True):
        low, middle, high = _interval(losses)
        print(f"{folder}: perplexity {middle:.2f}, 95 % between {low:.2f} and {high:.2f}")
    last = f"{options.windows} windows of {options.window} tokens"
    if options.against is not None:
        ratio = compare_losses(found[1], found[0])
        low, middle, high = _interval(found[0] - found[1])
        report["ratio"] = (low, middle, high)
        last += f"; ratio {ratio.ratio:.4f}, 95 % between {low:.4f} and {high:.4f}"
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"evaluate: done, {last}")
    return 0


def _load(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Any causal language model; a converted one decodes from its latents."""
    if is_converted(read_config(folder)):
        return load_any(folder, device=device, dtype=dtype)
    return load_model(folder, device=device, dtype=dtype)


def _check_same_tokens(options: argparse.Namespace, text: str, windows: Tensor) -> None:
    from mla.convert.evaluate import token_windows

    other = load_tokenizer(options.against)
    shape = {"count": options.windows, "length": options.window}
    if not torch.equal(token_windows(other, text, **shape), windows):
        raise CommandError(
            f"{options.against} has another tokenizer than {options.model}, expected the same: "
            "perplexities over different tokens cannot be compared"
        )


def _losses(bars: Any, model: Any, windows: Tensor, rows: Any, name: str) -> Tensor:
    from mla.convert.evaluate import token_losses
    from mla.integrations.converted import coded_rows

    through = contextlib.nullcontext() if rows is None else coded_rows(model, rows)
    with through:
        return token_losses(model, windows, progress=bar(bars, name, len(windows)))


def _interval(losses: Tensor) -> tuple[float, float, float]:
    """exp of the mean loss with its 95 % interval over windows; without width for one window."""
    means = losses.mean(1)
    middle, count = float(means.mean()), len(means)
    if count == 1:
        return (math.exp(middle),) * 3
    factor = STUDENT_95[count - 2] if count - 2 < len(STUDENT_95) else 1.96
    half = factor * float(means.std()) / count**0.5
    return math.exp(middle - half), math.exp(middle), math.exp(middle + half)
