"""Turn the grouped-query attention of a Llama-type model into MLA, without training.

MODEL is a folder of transformers (Llama, Mistral, Qwen2; safetensors). The converted model goes
to DIR, with a report of what each layer lost; `python -m mla generate --model DIR` reads it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mla.cli.console import CommandError, device_of, progress, table
from mla.cli.models import (
    calibration_windows,
    go_offline,
    is_converted,
    load_model,
    load_tokenizer,
    read_config,
    read_text,
)
from mla.cli.options import at_least_two, share

REPORT_FILE = "report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model to convert")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="TEXT",
        help="text file like what the model will read",
    )
    parser.add_argument(
        "--kv-budget",
        type=share,
        default=0.75,
        metavar="SHARE",
        help="share of the bytes of the KV cache to keep (default: 0.75)",
    )
    parser.add_argument(
        "--tokens",
        type=at_least_two,
        default=8192,
        metavar="N",
        help="calibration tokens (default: 8192)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace a converted model at DIR")


def run(options: argparse.Namespace) -> int:
    check_target(options.out, replace=options.force)
    go_offline()
    device = device_of(options.device)
    read_config(options.model)
    read_text(options.calibration)
    tokenizer = load_tokenizer(options.model)
    windows = calibration_windows(tokenizer, options.calibration, options.tokens)
    model = load_model(options.model, device=device)
    from mla.integrations.converted import read_host, save_converted

    read_host(model, "convert")  # refuses before there are bars on the screen
    start = time.perf_counter()
    with progress() as bars:
        conversion = convert_with_bars(bars, model, windows, options.kv_budget)
    save_converted(conversion, options.out, tokenizer=tokenizer, overwrite=options.force)
    layers = fit_rows(conversion.reports)
    report = {
        "model": options.model.name,
        "kv_budget": options.kv_budget,
        "calibration_tokens": windows.numel(),
        "seconds": round(time.perf_counter() - start, 1),
        "layers": layers,
    }
    (options.out / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(fit_table(layers))
    kept = sum(layer["cached_numbers"] for layer in layers)
    before = sum(layer["original_numbers"] for layer in layers)
    print(
        f"convert: done, {len(layers)} layers keep {kept} of {before} cached numbers a token "
        f"({kept / before:.1%}), in {options.out}"
    )
    return 0


def check_target(folder: Path, *, replace: bool) -> None:
    """Refuse a taken folder before the work, not after it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise CommandError(f"{folder} is a file, expected a folder that does not exist")
    if not replace:
        raise CommandError(f"{folder} is not empty; --force replaces a converted model")
    if not ((folder / "config.json").is_file() and is_converted(read_config(folder))):
        raise CommandError(f"{folder} holds no converted model and is left alone; choose another")


def convert_with_bars(bars: Any, model: Any, windows: torch.Tensor, kv_budget: float) -> Any:
    """`mla.integrations.converted.convert_model` with two bars."""
    from mla.integrations.converted import convert_model

    layers = model.config.num_hidden_layers
    return convert_model(
        model,
        windows,
        kv_budget=kv_budget,
        calibrate_progress=bar(bars, f"calibrate, {windows.numel()} tokens", len(windows)),
        convert_progress=bar(bars, "convert layers", layers),
    )


def bar(bars: Any, text: str, total: int) -> Callable[[int, int], None]:
    """A callback (done, in all) that moves a new bar."""
    task = bars.add_task(text, total=total)
    return lambda done, all_of_them: bars.update(task, completed=done, total=all_of_them)


def fit_rows(reports: Sequence[Any]) -> list[dict[str, Any]]:
    """One plain dict for each layer."""
    return [
        {name: list(v) if isinstance(v, tuple) else v for name, v in report._asdict().items()}
        for report in reports
    ]


def fit_table(layers: Sequence[dict[str, Any]]) -> str:
    """Sizes and estimated errors of each layer."""
    header = ("layer", "R", "C", "cached", "of", "score error", "value error", "output error")
    return table(
        header,
        [
            (
                index,
                layer["rope_dim"],
                layer["latent_dim"],
                layer["cached_numbers"],
                layer["original_numbers"],
                *(f"{layer[name]:.4f}" for name in ("score_error", "value_error", "output_error")),
            )
            for index, layer in enumerate(layers)
        ],
    )
