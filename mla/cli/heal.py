"""Train the attention of a converted model for a few minutes, to do what the original's does.

DIR is what `python -m mla convert` wrote, MODEL what it read. First each layer learns the output of
the original layer, then all together learn the original's predictions; everything but attention
stays as it is. Windows at the end of the text are held out: progress is measured on them, healing
stops when they get no better, and the weights that did best there are written to --out, with
heal.json and heal.png. Perplexity on a text of its own: python -m mla evaluate.

What an interrupted healing needs to go on is in the file OUT.healing; --resume takes it up.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mla.cli.console import DTYPES, CommandError, device_of, progress, require, table
from mla.cli.convert import check_target
from mla.cli.heal_plot import write_heal_plot
from mla.cli.models import (
    go_offline,
    is_converted,
    load_model,
    load_tokenizer,
    read_config,
    read_text,
)
from mla.cli.options import at_least_two, positive, quantity

REPORT_FILE, PLOT_FILE = "heal.json", "heal.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="folder of the converted model")
    parser.add_argument(
        "--original", type=Path, required=True, metavar="MODEL", help="folder of the original"
    )
    parser.add_argument(
        "--calibration", type=Path, required=True, metavar="TEXT", help="text file to learn from"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR2", help="where to")
    parser.add_argument(
        "--steps", type=positive, default=400, metavar="N", help="windows to read (default: 400)"
    )
    parser.add_argument(
        "--minutes", type=quantity, metavar="M", help="stop by then (default: no limit)"
    )
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    parser.add_argument("--force", action="store_true", help="replace a converted model at DIR2")
    parser.add_argument(
        "--window", type=at_least_two, default=512, metavar="T", help="tokens (default: 512)"
    )
    parser.add_argument(
        "--learning-rate", type=quantity, metavar="X", help="relative to each matrix's values"
    )
    parser.add_argument(
        "--no-matching", action="store_true", help="learn the predictions from the start"
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="products of a float32 model in bfloat16: faster where the processor has them",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="less memory for a third more time"
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of both models (default: as stored)"
    )


def run(options: argparse.Namespace) -> int:
    require("matplotlib", "rich")
    check_target(options.out, replace=options.force)
    state = check_state(options)
    go_offline()
    device = device_of(options.device)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    if not is_converted(read_config(options.model)):
        raise CommandError(f"{options.model} holds no converted model; convert makes one")
    if is_converted(read_config(options.original)):
        raise CommandError(f"{options.original} is converted itself, expected the original model")
    text = read_text(options.calibration)
    tokenizer = load_tokenizer(options.model)

    from mla.integrations.converted import load_converted, save_converted
    from mla.integrations.converted.heal import heal

    how = heal_options(options)
    windows = text_windows(tokenizer, text, options, how.held_out)
    conversion = load_converted(options.model, dtype=dtype, device=device)
    original = load_model(options.original, device=device, dtype=dtype)
    seconds = None if options.minutes is None else 60.0 * options.minutes
    with progress() as bars:
        report = heal(
            conversion.model,
            original,
            windows,
            steps=options.steps,
            seconds=seconds,
            options=how,
            state=state,
            resume=options.resume and state.exists(),
            progress=_Bars(bars, seconds),
        )
    save_converted(conversion, options.out, tokenizer=tokenizer, overwrite=options.force)
    values = {
        "model": options.model.name,
        "original": options.original.name,
        "calibration": options.calibration.name,
        "window": options.window,
        "held_out_windows": how.held_out,
        "learning_rate": how.learning_rate,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **plain(report),
    }
    (options.out / REPORT_FILE).write_text(
        json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    write_heal_plot(values, options.out / PLOT_FILE)
    state.unlink()
    print(as_text(values))
    print(
        f"heal: done, {report.steps} steps in {report.seconds / 60:.1f} minutes ("
        f"{report.stopped}), perplexity ratio {report.before.ratio:.4f} -> "
        f"{report.after.ratio:.4f} on held-out text, in {options.out}"
    )
    return 0


def check_state(options: argparse.Namespace) -> Path:
    """The file that an interrupted healing leaves beside --out."""
    state: Path = options.out.with_name(options.out.name + ".healing")
    if state.exists() and not (options.resume or options.force):
        raise CommandError(
            f"{state} is left from an interrupted healing; --resume goes on, --force starts anew"
        )
    return state


def heal_options(options: argparse.Namespace) -> Any:
    """What the command line says, and the defaults of `HealOptions`."""
    from mla.integrations.converted.heal import HealOptions

    given: dict[str, Any] = {
        "bfloat16": options.bfloat16,
        "checkpointing": options.checkpointing,
    }
    if options.learning_rate is not None:
        given["learning_rate"] = options.learning_rate
    if options.no_matching:
        given["match_steps"] = 0
    return HealOptions(**given)


def text_windows(
    tokenizer: Any, text: str, options: argparse.Namespace, held_out: int
) -> torch.Tensor:
    """``[W, T]`` from the start of the text: one for each step and the held-out, or all it has."""
    from mla.convert.evaluate import CHARACTERS_PER_TOKEN

    wanted, length = options.steps + held_out, options.window
    share = text[: wanted * length * CHARACTERS_PER_TOKEN]
    ids = tokenizer(share, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(wanted, len(ids) // length)
    if count <= held_out:
        raise CommandError(
            f"{options.calibration} has {len(ids)} tokens, expected at least "
            f"{(held_out + 1) * length}: {held_out} windows of {length} are held out"
        )
    return torch.tensor(ids[: count * length]).view(count, length)


class _Bars:
    """One bar for each phase, with the last loss; the end is that of steps or of time."""

    def __init__(self, bars: Any, seconds: float | None) -> None:
        self.bars, self.seconds, self.start = bars, seconds, time.perf_counter()
        self.tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, of: int, loss: float) -> None:
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, total=of)
        if self.seconds is not None and phase == "distil":
            share = (time.perf_counter() - self.start) / self.seconds
            of = min(of, max(done + 1, round(done / share)))
        name = {"match": "match layers, error", "distil": "distil, KL"}[phase]
        self.bars.update(
            self.tasks[phase], completed=done, total=of, description=f"{name} {loss:.4f}"
        )


def plain(value: Any) -> Any:
    """Records as dicts, tuples as lists, what is no number as None."""
    if hasattr(value, "_asdict"):
        return {name: plain(entry) for name, entry in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(report: dict[str, Any]) -> str:
    """Before and after, and where the time went."""
    before, after = report["before"], report["after"]

    def ratio(found: dict[str, Any]) -> str:
        error = found["ratio_error"]
        return f"{found['ratio']:.4f}" + ("" if error is None else f" +- {error:.4f}")

    rows: list[tuple[str, ...]] = [
        (
            "perplexity",
            f"{before['before']:.3f}",
            f"{before['after']:.3f}",
            f"{after['after']:.3f}",
        ),
        ("relative to the original", "1", ratio(before), ratio(after)),
        (
            "KL from the original, nats a token",
            "0",
            f"{report['divergence_before']:.4f}",
            f"{report['divergence_after']:.4f}",
        ),
    ]
    layers = report["layers"]
    if layers:
        middle = [statistics.median(layer[name] for layer in layers) for name in layers[0]]
        rows.append(("error of a layer, median", "0", *(f"{value:.2e}" for value in middle)))
    return "\n".join(
        [
            f"{report['held_out_windows']} held-out windows of {report['window']} tokens of "
            f"{report['calibration']}",
            table(("", "original", "converted", "healed"), rows),
            f"  {report['tokens']} tokens in {report['processor_seconds']:.0f} processor seconds; "
            f"weights of step {report['best_step']}",
        ]
    )
