"""One decode step of one attention layer of DeepSeek-V2-Lite, against transformers' own layer.

A step is the whole layer for one new token: projections, rotation, append to the cache, attention
over everything cached, output projection. Both layers have the same weights and the same cached
latents, and the appended token is taken back between calls, outside the clock. transformers gets
its rotary table from outside, as its model does once for all layers; ours computes its own.
Before each timed call a twin with other weights runs, as the previous layer of a model would: code
is warm in the processor caches then, weights are not.

Dims: D=2048, H=16, C=512, N=128, R=64, V=128, batch 1; S cached positions.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Point
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import DenseLatentCache, MLAConfig, MultiheadLatentAttention, reference
from mla.ops import supported_impls
from mla.ops.select import Impl

CONFIG = MLAConfig(
    hidden_size=2048,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
# Ours once for each implementation of the decode op that runs here, the fastest last.
OURS = tuple(name for name, reason in supported_impls("mla_decode") if reason is None)[::-1]
IMPLS = ("transformers sdpa", "transformers eager", *(f"mla {name}" for name in OURS))
# How many times faster than transformers' default, by dtype and S.
TARGETS = {
    ("float32", 2048): 25,
    ("float32", 8192): 40,
    ("bfloat16", 2048): 30,
    ("bfloat16", 8192): 60,
}


class Inputs(NamedTuple):
    hidden_states: Tensor  # [1, 1, D]
    latent: Tensor  # [1, S, C]
    k_rope: Tensor  # [1, S, R]


class Step(NamedTuple):
    run: Callable[[], Tensor]
    undo: Callable[[], None]  # takes the appended token back


def points(quick: bool) -> list[Point]:
    lengths = (512, 2048, 8192) if quick else (512, 2048, 8192, 32768)
    return [{"dtype": dtype, "S": S} for dtype in ("float32", "bfloat16") for S in lengths]


@lru_cache(maxsize=2)
def our_layer(dtype: torch.dtype, seed: int = 0) -> MultiheadLatentAttention:
    torch.manual_seed(seed)
    return MultiheadLatentAttention(CONFIG, dtype=dtype).eval()


def hf_config() -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        hidden_size=CONFIG.hidden_size,
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=CONFIG.kv_lora_rank,
        qk_nope_head_dim=CONFIG.qk_nope_head_dim,
        qk_rope_head_dim=CONFIG.qk_rope_head_dim,
        v_head_dim=CONFIG.v_head_dim,
        max_position_embeddings=1 << 16,
    )


def stock_layer(layer: MultiheadLatentAttention, attention: str) -> tuple[Any, Any]:
    """transformers' layer with the weights of ours, without a copy, and its rotary table."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

    config = hf_config()
    config._attn_implementation = attention
    with torch.device("meta"):
        module = stock.DeepseekV2Attention(config, layer_idx=0)
    module.load_state_dict(layer.state_dict(), strict=True, assign=True)
    return module.train(layer.training), stock.DeepseekV2RotaryEmbedding(config)


@lru_cache(maxsize=1)
def inputs(S: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(S)
    sizes = ((1, CONFIG.hidden_size), (S, CONFIG.kv_lora_rank), (S, CONFIG.qk_rope_head_dim))
    drawn = (torch.randn(1, *size, generator=generator).to(dtype) for size in sizes)
    return Inputs(*drawn)


def setup(point: Point, impl: str) -> Candidate:
    S, dtype = int(point["S"]), getattr(torch, str(point["dtype"]))
    step, twin = (_step(our_layer(dtype, seed), inputs(S, dtype), impl) for seed in (0, 1))

    def before() -> None:
        twin.run()
        twin.undo()

    weights = sum(parameter.nbytes for parameter in our_layer(dtype).parameters())
    return Candidate(
        run=step.run,
        before=before,
        after=step.undo,
        num_bytes=weights + sum(x.nbytes for x in inputs(S, dtype)),
        num_flops=_flops(S, impl),
    )


def _step(layer: MultiheadLatentAttention, given: Inputs, impl: str) -> Step:
    S = given.latent.shape[1]
    if impl.startswith("mla"):
        layer = copy(layer)
        layer.impl = cast(Impl, impl.split()[-1])
        cache = DenseLatentCache(CONFIG, batch_size=1, dtype=given.latent.dtype)
        cache.reserve(S)
        cache.append(0, given.latent, given.k_rope)
        return Step(
            torch.no_grad()(lambda: layer(given.hidden_states, cache=cache)),
            lambda: cache.truncate([S]),
        )
    from transformers import DynamicCache

    module, rotary = stock_layer(layer, impl.split()[-1])
    past = DynamicCache()
    past.update(given.latent[:, None], given.k_rope[:, None], 0)
    table = rotary(given.hidden_states, torch.tensor([[S]]))

    @torch.no_grad()
    def run() -> Tensor:
        output: Tensor = module(
            given.hidden_states, past_key_values=past, position_embeddings=table
        )[0]
        return output

    return Step(run, lambda: past.crop(-1))


def _flops(S: int, impl: str) -> int:
    """Multiplications and additions of one step, twice the products."""
    c = CONFIG
    D, H, C = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    N, R, V = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    products = D * H * (N + R) + D * (C + R) + H * V * D
    if impl.startswith("mla"):
        products += H * C * (N + V) + (S + 1) * H * (2 * C + R)
    else:
        products += (S + 1) * H * (C * (N + V) + N + R + V)
    return 2 * products


@torch.no_grad()
def expected(point: Point) -> Tensor | None:
    """By the oracle in float64 at the shortest length, where that takes no time."""
    S, dtype = int(point["S"]), getattr(torch, str(point["dtype"]))
    if S > 512:
        return None
    given = Inputs(*(x.double() for x in inputs(S, dtype)))
    layer = MultiheadLatentAttention(CONFIG, dtype=torch.float64)
    layer.load_state_dict(our_layer(dtype).state_dict())
    positions = torch.tensor([[S]])
    latent, k_rope = layer.latents(given.hidden_states, positions)
    attention = reference.expanded_attention(
        layer.queries(given.hidden_states, positions),
        torch.cat([given.latent, latent], dim=1),
        torch.cat([given.k_rope, k_rope], dim=1),
        layer.kv_b_proj.weight,
        num_heads=CONFIG.num_attention_heads,
        value_dim=CONFIG.v_head_dim,
        scale=CONFIG.scale,
    )
    output: Tensor = layer.o_proj(attention.out.flatten(2))
    return output


COMPARISON = Comparison(impls=IMPLS, setup=setup, expected=expected)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    target = TARGETS.get((str(point["dtype"]), int(point["S"])))
    return [
        {**row, "target": target if str(row["impl"]).startswith("mla") else None}
        for row in COMPARISON.rows_at(point, options, on_round)
    ]


BENCHMARK = Benchmark(
    name="layer",
    title="One decode step of one DeepSeek-V2-Lite attention layer, batch 1, S tokens cached",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
