"""Bytes that a pool really takes for one token, and how many long sequences fit into 80 GB.

Measured from the storage of a `PagedLatentCache`, all layers, over its positions; weights and
activations are not counted. The demo's model is there after `make demo`. `grouped` is a 16-bit
cache of keys and values for every key-value head: what the demo's model had before conversion, and
what DeepSeek-V3 would need without its latent.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from benchmarks.harness import Point
from benchmarks.report import ROOT, Row
from benchmarks.sweep import Benchmark, Options, main
from mla import MLAConfig, PagedLatentCache
from mla.codec import codec_from_spec
from mla.plan import grouped_bytes_per_token, sequences_that_fit
from mla.plan.models import config_layers, preset_layers

MEMORY = 80 * 10**9
SEQUENCE = 32768  # tokens
PAGES, PAGE_SIZE = 2, 64
GROUPED = "grouped, bf16"
CODECS = ("plain", "fp8", "int8", "int4")
DEEPSEEK, CONVERTED = "deepseek-v3", "smollm2-135m, converted"
CONVERTED_CONFIG = ROOT / "out" / "demo" / "model" / "config.json"  # of make demo


def layers_of(model: str) -> list[MLAConfig]:
    """One config for each layer."""
    if model == DEEPSEEK:
        return list(preset_layers(DEEPSEEK))
    return list(config_layers(json.loads(CONVERTED_CONFIG.read_text(encoding="utf-8"))))


def grouped(model: str) -> int:
    """DeepSeek-V3: 128 heads, key and value 320 numbers together."""
    heads, head_dim = (128, 160) if model == DEEPSEEK else (3, 64)
    return len(layers_of(model)) * grouped_bytes_per_token(heads, head_dim)


def points(quick: bool) -> list[Point]:
    models = (DEEPSEEK, CONVERTED) if CONVERTED_CONFIG.is_file() else (DEEPSEEK,)
    return [{"model": model, "rows": rows} for model in models for rows in (GROUPED, *CODECS)]


def bytes_of(model: str, rows: str) -> float:
    """A token's share of real storage."""
    if rows == GROUPED:
        return grouped(model)
    pool = PagedLatentCache(
        layers_of(model),
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        codec=codec_from_spec(rows),
        dtype=torch.bfloat16,
    )
    return pool.nbytes / (PAGES * PAGE_SIZE)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    size = bytes_of(str(point["model"]), str(point["rows"]))
    on_round()
    return [
        {**point, "bytes_per_token": size, "sequences": sequences_that_fit(MEMORY, SEQUENCE, size)}
    ]


BENCHMARK = Benchmark(
    name="capacity",
    title=f"Cache of one token, all layers, and sequences of {SEQUENCE:,} tokens in 80 GB",
    points=points,
    rows_at=rows_at,
    steps=lambda options: 1,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
