"""Turn the grouped-query attention of a Llama-type model into MLA, without training.

MODEL is a folder of transformers (Llama, Mistral, Qwen2; safetensors). The converted model goes
to DIR, with a report of what each layer lost as JSON and PNG; `python -m mla generate --model DIR`
reads it. What is learnt from the calibration text lies in a folder beside DIR until the end, so
that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mla.cli.console import CommandError, device_of, progress, quiet, require, table
from mla.cli.convert_plot import write_conversion_plot
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

REPORT_FILE, PLOT_FILE = "report.json", "report.png"


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
        default=32768,
        metavar="N",
        help="calibration tokens (default: 32768); more is better and slower",
    )
    parser.add_argument(
        "--layout",
        choices=("free", "deepseek_v3"),
        default="free",
        help="deepseek_v3: a folder that transformers loads as DeepSeek-V3 without this package",
    )
    parser.add_argument(
        "--objective",
        choices=("output", "published"),
        default="output",
        help="published: a method from the literature, to compare with (default: output)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace a converted model at DIR")


def run(options: argparse.Namespace) -> int:
    is_free = options.layout == "free"
    check_target(options.out, replace=options.force, export=not is_free)
    go_offline()
    require("matplotlib", "rich")
    device = device_of(options.device)
    read_config(options.model)
    read_text(options.calibration)
    tokenizer = load_tokenizer(options.model)
    windows = calibration_windows(tokenizer, options.calibration, options.tokens)
    model = load_model(options.model, device=device)
    from mla.integrations.converted import read_host, save_converted
    from mla.integrations.converted.deepseek import check_mlps, export_deepseek_v3

    read_host(model, "convert")  # refuses before there are bars on the screen
    if not is_free:
        check_mlps(model)
    start = time.perf_counter()
    folder = options.out.parent / f".{options.out.name}-survey"
    with progress() as bars:
        conversion, survey = convert_with_bars(
            bars,
            model,
            windows,
            options.kv_budget,
            layout=options.layout,
            objective=options.objective,
            folder=folder,
        )
    with quiet():
        save = save_converted if is_free else export_deepseek_v3
        save(conversion, options.out, tokenizer=tokenizer, overwrite=options.force)
    layers = fit_rows(conversion.reports)
    kept = sum(layer["cached_numbers"] for layer in layers)
    before = sum(layer["original_numbers"] for layer in layers)
    report = {
        "model": options.model.name,
        "kv_budget": options.kv_budget,
        "layout": options.layout,
        "objective": options.objective,
        "calibration_tokens": windows.numel(),
        "seconds": round(time.perf_counter() - start, 1),
        "kept_numbers": kept,
        "original_numbers": before,
        "layers": layers,
        "budgets": budget_rows(survey, before),
    }
    (options.out / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_conversion_plot(report, options.out / PLOT_FILE)
    shutil.rmtree(folder)
    print(fit_table(layers))
    print(
        f"convert: done, {len(layers)} layers keep {kept} of {before} cached numbers a token "
        f"({kept / before:.1%}), in {options.out}"
    )
    return 0


def check_target(folder: Path, *, replace: bool, export: bool = False) -> None:
    """Refuse a taken folder before the work, not after it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise CommandError(f"{folder} is a file, expected a folder that does not exist")
    if not replace:
        raise CommandError(f"{folder} is not empty; --force replaces a converted model")
    if export:
        from mla.integrations.converted.deepseek import check_target as check_export

        check_export(folder, overwrite=True)
    elif not ((folder / "config.json").is_file() and is_converted(read_config(folder))):
        raise CommandError(f"{folder} holds no converted model and is left alone; choose another")


def convert_with_bars(
    bars: Any,
    model: Any,
    windows: torch.Tensor,
    kv_budget: float,
    *,
    layout: Any = "free",
    objective: Any = "output",
    folder: Path | None = None,
) -> tuple[Any, Any]:
    """The conversion and the survey of `mla.integrations.converted`, with bars."""
    from mla.integrations.converted import convert_model, survey_model

    layers = model.config.num_hidden_layers
    is_measured = layout == "free" and objective == "output" and kv_budget < 1.0
    survey = survey_model(
        model,
        windows,
        kv_budgets=[kv_budget] if is_measured else [],
        folder=folder,
        progress=bar(bars, f"calibrate, {windows.numel()} tokens", layers * len(windows)),
    )
    advance: dict[str, Any] = {"convert_progress": bar(bars, "convert layers", layers)}
    if layout != "free":
        advance["layout_progress"] = bar(bars, "seek a common layout", layers)
    conversion = convert_model(
        model,
        windows,
        kv_budget=kv_budget,
        layout=layout,
        objective=objective,
        survey=survey,
        **advance,
    )
    return conversion, survey


def budget_rows(survey: Any, original_numbers: int) -> list[dict[str, float]]:
    """The least measured error, all layers together, of budgets around the one asked for."""
    from mla.convert.allocate import allocate

    options = [layer.options for layer in survey]
    if not all(options):
        return []
    least = sum(min(option.size for option in layer) for layer in options)
    most = sum(max(option.size for option in layer) for layer in options)
    totals = [least + (most - least) * step // 10 for step in range(11)]
    return [
        {
            "share": total / original_numbers,
            "error": sum(option.error for option in allocate(options, total)),
        }
        for total in totals
    ]


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
