"""Perplexity of a real model whose cached rows are coded: what each codec costs and saves.

SmolLM2-135M-Instruct Q4_1, its attention written as MLA at full rank (`exact`: the original's own
keys and values behind one latent) and converted at 75 % of its KV bytes. Every token attends to
rows as the codec gives them back. ``ratio`` is the perplexity over that with unquantised rows of
the same model, from paired differences on the same tokens; ``ratio_error`` its standard error over
windows.

Codecs are named kind/group/rope bits/rotated; `int8/1024` has one scale for a whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Point
from benchmarks.report import ROOT, Row
from benchmarks.sweep import Benchmark, Options, main
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec, codec_from_spec
from mla.convert import compare_losses, token_losses, token_windows
from mla.plan import bytes_per_token

DATA = ROOT / ".cache" / "mla"
BUDGETS = {"exact": 1.0, "75 %": 0.75}
CALIBRATION_TOKENS = 8192
WINDOW = 1024
# The defaults first; then what was weighed against them.
DEFAULTS: tuple[Codec, ...] = (PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec())
OTHERS: tuple[Codec, ...] = (
    Int8Codec(rope_bits=8),
    Int8Codec(group=1024),
    Int8Codec(group=64),
    Int4Codec(rope_bits=8),
    Int4Codec(group=32),
    Int4Codec(group=128),
    Int4Codec(rotation=False),
    Int4Codec(group=32, rotation=False),
    Int4Codec(group=1024),
)


def points(quick: bool) -> list[Point]:
    codecs = DEFAULTS if quick else DEFAULTS + OTHERS
    return [{"model": name, "codec": codec.spec} for name in BUDGETS for codec in codecs]


def windows_of(options: Options) -> int:
    return 2 if options.quick else 8


@lru_cache(maxsize=1)
def converted(budget: float) -> Any:
    """The model, converted at ``budget``."""
    from mla.cli.models import calibration_windows, go_offline
    from mla.integrations.converted import convert_model

    go_offline()
    tokens = calibration_windows(tokenizer(), DATA / "text/calibration.txt", CALIBRATION_TOKENS)
    return convert_model(original(), tokens, kv_budget=budget).model


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from mla.cli.models import load_tokenizer

    return load_tokenizer(folder())


@lru_cache(maxsize=1)
def original() -> Any:
    from mla.cli.models import load_model

    return load_model(folder(), device=torch.device("cpu"), dtype=torch.float32)


def folder() -> Path:
    return DATA / "smollm2-135m-instruct-q4_1"


def reason_absent() -> str | None:
    """Why there is no model here."""
    return None if folder().is_dir() else f"{folder()} does not exist; run make data"


def losses(budget: float, codec: Codec, count: int, on_window: Callable[[], None]) -> Tensor:
    """``[W, T-1]``, see `token_losses`."""
    from mla.integrations.converted import coded_rows

    text = (DATA / "text/evaluation.txt").read_text(encoding="utf-8")
    windows = token_windows(tokenizer(), text, count=count, length=WINDOW)
    model = converted(budget)
    with coded_rows(model, codec):
        return token_losses(model, windows, progress=lambda done, total: on_window())


@lru_cache(maxsize=1)
def plain_losses(budget: float, count: int) -> Tensor:
    return losses(budget, PlainCodec(), count, lambda: None)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    count, budget = windows_of(options), BUDGETS[str(point["model"])]
    codec = codec_from_spec(str(point["codec"]))
    found = compare_losses(plain_losses(budget, count), losses(budget, codec, count, on_round))
    layers = converted(budget).base_model.layers
    configs = [layer.self_attn.mla.config for layer in layers]
    size = sum(bytes_per_token(config, codec) for config in configs)
    return [
        {
            **point,
            "bytes_per_token": size,
            "perplexity": found.after,
            "ratio": found.ratio,
            "ratio_error": found.ratio_error,
            "windows": count,
        }
    ]


BENCHMARK = Benchmark(
    name="codecs",
    title=f"Perplexity with coded rows, windows of {WINDOW} tokens of Wikipedia text",
    points=points,
    rows_at=rows_at,
    steps=windows_of,
    reason_absent=reason_absent,
    is_long=True,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
