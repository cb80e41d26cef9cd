"""Decoding a whole model on this machine: tokens per second at batch 1 with S tokens cached.

    stock    transformers' own attention and cache
    torch    `replace_attention(impl="torch")` and its cache
    cpp      the same with impl="cpp", where the extension is built

Two models. `v2-lite-4` has the attention of DeepSeek-V2-Lite (D=2048, H=16, C=512, N=128, R=64,
V=128), 4 layers of random weights in bfloat16, and a small vocabulary and dense MLP, so that
attention is most of a step: ratios are those of attention, not of a whole V2-Lite. `smollm2` is the
real model of `make data` in float32; stock is the unconverted one, which computes something else
(grouped-query attention), the others are converted to MLA as `mla demo` does, from fewer tokens,
which changes values but no size. It is left out where the data is missing.

All candidates take turns in one process. Caches are filled with random rows instead of a prefill;
the token that a step appends is taken back outside the clock.

``joules_per_token`` repeats the step of each candidate for some seconds between two readings of the
machine's counters, after the timing; a line says why where there are none, and the column stays
empty. ``cost_per_million_tokens`` follows from ``--price-per-hour`` and tokens_per_s. Both are of
one sequence: a batch shares the reading of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.energy import EnergyMeter, cost_columns, joules_per_token
from benchmarks.harness import Candidate, Point
from benchmarks.notes import skipped
from benchmarks.report import ROOT, Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla.ops import supported_impls

DATA = ROOT / ".cache" / "mla"
SMOLLM2 = DATA / "smollm2-135m-instruct-q4_1"
CALIBRATION = DATA / "text" / "calibration.txt"
CALIBRATION_TOKENS = 2048
OURS = tuple(name for name, reason in supported_impls("mla_decode") if reason is None)[::-1]
IMPLS = ("stock", *OURS)


def points(quick: bool) -> list[Point]:
    lengths = (1024, 4096) if quick else (1024, 4096, 16384)
    models = [("v2-lite-4", "bfloat16")]
    if SMOLLM2.is_dir() and CALIBRATION.is_file():
        models.append(("smollm2", "float32"))
    return [{"model": name, "dtype": dtype, "S": S} for name, dtype in models for S in lengths]


def twin(model: Any) -> Any:
    """A copy that shares the parameters."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters()})


@lru_cache(maxsize=1)
def models(name: str) -> dict[str, Any]:
    """The model of each candidate."""
    from mla.integrations.transformers import replace_attention

    stock, base = v2_lite() if name == "v2-lite-4" else smollm2()
    found = {"stock": stock}
    for impl in OURS:
        found[impl] = twin(base)
        replace_attention(found[impl], impl=impl)
    return found


def v2_lite() -> tuple[Any, Any]:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        hidden_size=2048,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=1024,
        intermediate_size=1024,
        first_k_dense_replace=4,
        max_position_embeddings=1 << 16,
    )
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16).eval()
    return model, model


def smollm2() -> tuple[Any, Any]:
    """The original and its conversion."""
    from mla.cli.models import calibration_windows, go_offline, load_model, load_tokenizer
    from mla.integrations.converted import convert_model

    go_offline()
    model = load_model(SMOLLM2, device=torch.device("cpu"), dtype=torch.float32)
    windows = calibration_windows(load_tokenizer(SMOLLM2), Path(CALIBRATION), CALIBRATION_TOKENS)
    return model, convert_model(model, windows).model


def filled_cache(model: Any, point: Point, is_stock: bool) -> Any:
    """Random rows for every layer; ours in the buffers that ``generate`` would make."""
    S, dtype = int(point["S"]), getattr(torch, str(point["dtype"]))
    from transformers import DynamicCache

    from mla.integrations.transformers import LatentCache

    config = model.config
    cache = DynamicCache(config=config) if is_stock else LatentCache(config)
    rng = torch.Generator().manual_seed(S)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if hasattr(attention, "kv_lora_rank"):
            shapes = [(1, 1, S, attention.kv_lora_rank), (1, 1, S, attention.qk_rope_head_dim)]
        else:
            shapes = [(1, config.num_key_value_heads, S, attention.head_dim)] * 2
        rows = [torch.randn(shape, generator=rng).to(dtype).to(model.dtype) for shape in shapes]
        with torch.no_grad():
            cache.update(*rows, index)
    return cache


def next_logits(model: Any, cache: Any) -> Tensor:
    ids = torch.ones(1, 1, dtype=torch.int64)
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


@torch.no_grad()
def expected(point: Point) -> Tensor | None:
    """In float32 by plain PyTorch, for the model that has one answer and a rounded one."""
    from mla.integrations.transformers import replace_attention

    name = str(point["model"])
    if name == "smollm2":
        return None
    model = copy.deepcopy(models(name)["stock"]).float()
    replace_attention(model, impl="torch")
    return next_logits(model, filled_cache(model, point, False))


def setup(point: Point, impl: str) -> Candidate:
    name = str(point["model"])
    model = models(name)[impl]
    cache = filled_cache(model, point, impl == "stock")
    is_other = impl == "stock" and name == "smollm2"  # computes something else, not to be compared

    @torch.no_grad()
    def step() -> Tensor | None:
        logits = next_logits(model, cache)
        return None if is_other else logits

    return Candidate(run=step, after=lambda: cache.crop(-1))


COMPARISON = Comparison(impls=IMPLS, setup=setup, expected=expected)


def seconds_of_energy(quick: bool) -> float:
    """Long enough for counters that move ten times a second."""
    return 1.0 if quick else 3.0


def joules_of(point: Point, impl: str, meter: EnergyMeter, seconds: float) -> float | None:
    """Of each token that ``impl`` makes; None, and a line, where the machine does not say."""
    joules = None
    if meter.is_able:
        candidate = setup(point, impl)
        joules = joules_per_token(
            candidate.run, meter=meter, seconds=seconds, after=candidate.after
        )
    if meter.reason_absent is not None:
        skipped("models", "joules_per_token", meter.reason_absent)
    return joules


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    meter, seconds = EnergyMeter(), seconds_of_energy(options.quick)
    found: list[Row] = []
    for row in COMPARISON.rows_at(point, options, on_round):
        speed = 1e3 / float(row["median_ms"] or 0)
        is_timed = speed == speed  # without memory there is no time
        joules = joules_of(point, str(row["impl"]), meter, seconds) if is_timed else None
        costs = cost_columns(
            speed if is_timed else None,
            joules_per_token=joules,
            price_per_hour=options.price_per_hour,
        )
        found.append({**row, "tokens_per_s": speed, **costs})
    return found


BENCHMARK = Benchmark(
    name="models",
    title="Decoding a whole model, batch 1, S tokens cached",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "dtype", "cpu_ms", "cpu_speedup"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
