"""Convert a real model to MLA and show what that saves and what it costs.

SmolLM2-135M-Instruct Q4_1 and English Wikipedia text, as `make data` prepares them. Writes the
converted model, report.json and demo.png to the folder --out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mla.cli.console import CommandError, progress, quiet, require, table
from mla.cli.convert import bar, check_target, convert_with_bars, fit_rows
from mla.cli.costs import arithmetic, cached_bytes, crossover_text
from mla.cli.models import calibration_windows, go_offline, load_model, load_tokenizer, read_text
from mla.cli.options import at_least_two, codec, positive, share
from mla.cli.plot import write_plot
from mla.cli.speed import decode_speeds, num_steps
from mla.plan import bytes_per_token

DATA = Path(".cache/mla")
MODEL = DATA / "smollm2-135m-instruct-q4_1"
NAMES = {MODEL.name: "SmolLM2-135M-Instruct Q4_1"}
MODEL_FOLDER = "model"  # of the converted model, inside --out
DTYPE = torch.float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = DATA / "text"
    parser.add_argument(
        "--model", type=Path, default=MODEL, metavar="DIR", help=f"default: {MODEL}"
    )
    parser.add_argument(
        "--calibration", type=Path, default=text / "calibration.txt", metavar="TEXT"
    )
    parser.add_argument("--evaluation", type=Path, default=text / "evaluation.txt", metavar="TEXT")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR")
    parser.add_argument("--kv-budget", type=share, default=0.75, metavar="SHARE")
    parser.add_argument(
        "--codec", type=codec, metavar="NAME", help="also with rows coded as fp8, int8 or int4"
    )
    parser.add_argument("--tokens", type=at_least_two, default=16384, help="calibration tokens")
    parser.add_argument("--windows", type=positive, default=8, help="of the perplexity")
    parser.add_argument("--window", type=at_least_two, default=1024, help="tokens in each")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=positive, default=8, help="timed steps at each context")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-new-tokens", type=positive, default=24)


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    for path in (options.model, options.calibration, options.evaluation):
        if not path.exists():
            raise CommandError(f"{path} does not exist; run make data, or name another one")
    go_offline()
    require("matplotlib", "rich")
    check_target(options.out / MODEL_FOLDER, replace=True)
    options.out.mkdir(parents=True, exist_ok=True)
    report = measure(options)
    report["seconds"] = round(time.perf_counter() - start, 1)
    text = json.dumps(report, indent=1, allow_nan=False)
    (options.out / "report.json").write_text(text + "\n", encoding="utf-8")
    write_plot(report, options.out / "demo.png")
    print(as_text(report))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Convert, save, load again, and hold the loaded model against the original."""
    from mla.integrations.converted import load_converted, save_converted
    from mla.integrations.transformers import LatentCache, replace_attention

    tokenizer = load_tokenizer(options.model)
    contexts = sorted(set(options.contexts))
    text_ids = _text_ids(tokenizer, options, contexts)
    windows = calibration_windows(tokenizer, options.calibration, options.tokens)
    original = load_model(options.model, device=torch.device("cpu"), dtype=DTYPE)
    folder = options.out / MODEL_FOLDER
    phases: dict[str, dict[str, float]] = {}
    with progress() as bars:
        with _timed(phases, "calibrate, convert"):
            conversion, _ = convert_with_bars(bars, original, windows, options.kv_budget)
        with _timed(phases, "save, load"), quiet():
            save_converted(conversion, folder, tokenizer=tokenizer, overwrite=True)
            converted = load_converted(folder).model
        models = {"original": original, "converted": converted}
        with _timed(phases, "perplexity"):
            losses = _losses(bars, models, tokenizer, options)
            perplexity = _compared(losses["original"], losses["converted"], options)
            coded = None
            if options.codec is not None:
                coded = _coded(bars, converted, tokenizer, losses["original"], options)
        steps = num_steps(len(models), contexts, options.steps)
        advance = bars.add_task("prefill and decode, in turns", total=steps)
        with _timed(phases, "prefill, decode"):
            decode = decode_speeds(
                *(models, text_ids, contexts),
                steps=options.steps,
                # As generate makes it; the model itself makes transformers', copied each step.
                caches={"converted": LatentCache(converted.config)},
                on_step=lambda: bars.advance(advance),
            )
        with _timed(phases, "continue the prompt"):
            texts = {name: _continuation(m, tokenizer, options) for name, m in models.items()}
            if options.codec is not None:
                replace_attention(converted, codec=options.codec)
                texts[options.codec.kind] = _continuation(converted, tokenizer, options)
    configs = [layer.self_attn.mla.config for layer in converted.base_model.layers]
    if coded is not None:
        coded["bytes_per_token"] = sum(bytes_per_token(c, options.codec) for c in configs)
    return {
        "model": NAMES.get(options.model.name, options.model.name),
        "kv_budget": options.kv_budget,
        "calibration_tokens": windows.numel(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "bytes_per_token": cached_bytes(original.config, configs, DTYPE),
        "perplexity": perplexity,
        "coded": coded,
        "decode": decode,
        "arithmetic": arithmetic(original.config, configs, contexts),
        "prompt": options.prompt,
        "continuation": texts,
        "layers": fit_rows(conversion.reports),
        "converted_model": str(folder),
        "phases": phases,
    }


@contextmanager
def _timed(phases: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Add the wall and processor seconds of a block; the second tells a busy machine."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    phases[name] = {
        "seconds": round(time.perf_counter() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


def _text_ids(tokenizer: Any, options: argparse.Namespace, contexts: list[int]) -> torch.Tensor:
    """Enough of the evaluation text to fill every context and step on."""
    from mla.convert.evaluate import token_windows

    length = contexts[-1] + (options.steps + 1) * len(contexts)
    return token_windows(tokenizer, read_text(options.evaluation), count=1, length=length)[0]


def _losses(
    bars: Any, models: dict[str, Any], tokenizer: Any, options: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """``[W, T-1]`` of each model over the same windows of text."""
    from mla.convert.evaluate import token_losses, token_windows

    text = read_text(options.evaluation)
    windows = token_windows(tokenizer, text, count=options.windows, length=options.window)
    return {
        name: token_losses(model, windows, progress=bar(bars, f"perplexity, {name}", len(windows)))
        for name, model in models.items()
    }


def _compared(
    before: torch.Tensor, after: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Both perplexities, and the ratio with its standard error."""
    from mla.convert.evaluate import compare_losses

    found = compare_losses(before, after)
    return {
        "original": found.before,
        "converted": found.after,
        "ratio": found.ratio,
        "ratio_standard_error": None if math.isnan(found.ratio_error) else found.ratio_error,
        "windows": options.windows,
        "window": options.window,
    }


def _coded(
    bars: Any, converted: Any, tokenizer: Any, before: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """The converted model with coded rows: every token attends to what a coded cache holds."""
    from mla.integrations.converted import coded_rows

    kind = options.codec.kind
    with coded_rows(converted, options.codec):
        losses = _losses(bars, {f"converted, {kind} rows": converted}, tokenizer, options)
    (after,) = losses.values()
    return {"codec": options.codec.spec, **_compared(before, after, options)}


def _continuation(model: Any, tokenizer: Any, options: argparse.Namespace) -> str:
    """The likeliest continuation of the prompt."""
    inputs = tokenizer(options.prompt, return_tensors="pt")
    with quiet():
        ids = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def as_text(report: dict[str, Any]) -> str:
    """The table, what follows from it, and one last line."""
    size, coded = report["bytes_per_token"], report["coded"]
    share = size["converted"]["bits16"] / size["original"]["bits16"]
    ratio = _ratio(report["perplexity"])
    last = f"{share:.1%} of the bytes, perplexity {ratio}"
    if coded is not None:
        coded_share = coded["bytes_per_token"] / size["original"]["bits16"]
        last += f"; with {coded['codec']} rows {coded_share:.1%}, {_ratio(coded)}"
    lines = [
        f"{report['model']}, attention converted to MLA at {share:.0%} of its KV bytes, "
        f"{report['calibration_tokens']} calibration tokens",
        table(("", "original", "converted", "change"), _rows(report)),
        "",
        *textwrap.wrap(crossover_text(report["arithmetic"]), 98),
        f"Speeds: {report['dtype']}, {report['threads']} threads, medians of steps taken in turns.",
        "",
        f"{report['prompt']!r} continues",
        *(f"  {name:10} {text!r}" for name, text in report["continuation"].items()),
        "",
        f"demo: done in {report['seconds']:.0f} s; {last}; "
        f"report.json, demo.png and model/ in {Path(report['converted_model']).parent}",
    ]
    return "\n".join(lines)


def _ratio(found: dict[str, Any]) -> str:
    error = found["ratio_standard_error"]
    return f"x {found['ratio']:.3f}" + (f" +- {error:.3f}" if error is not None else "")


def _rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    found, size, work = report["perplexity"], report["bytes_per_token"], report["arithmetic"]
    coded, before = report["coded"], report["bytes_per_token"]["original"]["bits16"]
    rows = [
        _integers("KV cache, bytes a token, 16-bit", {k: v["bits16"] for k, v in size.items()}),
        _integers(
            f"KV cache, bytes a token, {report['dtype']} as here",
            {k: v["stored"] for k, v in size.items()},
        ),
        _perplexities(f"perplexity, {found['windows']} x {found['window']} tokens", found),
    ]
    if coded is not None:
        both = {"original": before, "converted": coded["bytes_per_token"]}
        rows.insert(2, _integers(f"KV cache, bytes a token, {coded['codec']} rows", both))
        rows.append(_perplexities(f"perplexity, {coded['codec']} rows", coded))
    for context, measured in report["decode"].items():
        rates = measured["tokens_per_second"]
        pairs = zip(measured["rounds"]["original"], measured["rounds"]["converted"], strict=True)
        faster = statistics.median(before / after for before, after in pairs)
        rows.append(
            (
                f"decoding at {int(context):,} tokens, tokens/s",
                f"{rates['original']:.1f}",
                f"{rates['converted']:.1f}",
                f"x {faster:.2f}",
            )
        )
    rows.append(_integers("multiply-adds a cached token and layer", work["per_cached_token"]))
    for context, both in work["per_step"].items():
        rows.append(_integers(f"multiply-adds a step and layer at {int(context):,}", both))
    return rows


def _perplexities(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    return name, f"{found['original']:.2f}", f"{found['converted']:.2f}", _ratio(found)


def _integers(name: str, both: dict[str, int]) -> tuple[str, ...]:
    before, after = both["original"], both["converted"]
    return name, f"{before:,}", f"{after:,}", f"x {after / before:.2f}"
