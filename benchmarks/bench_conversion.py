"""Converting one layer of grouped-query attention, and what calibration adds for each token.

    gqa_to_mla     the whole conversion of a layer at 75 % of its cached numbers, best split chosen
    one split      the same with rope and latent widths given
    plain SVD      the yardstick: one truncated SVD of the stacked key and value projections, which
                   knows neither the inputs nor the rotation; not a conversion that works

    moments        second moments of a window of inputs: one window; the model's own forward pass,
                   which calibration needs as well, is not in it

A layer is converted once, so seconds are fine; memory is the peak of a call. Before timing, a
conversion at full rank is held against the original attention in float64.

Dims: D model width, H heads, G key-value heads, d head width, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import baselines
from benchmarks.harness import Candidate, Point, gate
from benchmarks.memory import with_peak
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import MultiheadLatentAttention, reference
from mla.convert.gqa import ConvertedLayer, gqa_to_mla
from mla.convert.statistics import InputMoments, MomentSum
from mla.convert.weights import AttentionWeights

CONVERT, SPLIT, SVD, MOMENTS = "gqa_to_mla", "one split", "plain SVD", "moments"
TOKENS = 12  # of the check against the original


class Sizes(NamedTuple):
    D: int
    H: int
    G: int
    d: int


MODELS = {
    "tiny": Sizes(64, 4, 2, 16),
    "smollm2-135m": Sizes(576, 9, 3, 64),
    "llama-3.2-1b": Sizes(2048, 32, 8, 64),
}


def points(quick: bool) -> list[Point]:
    models = ("smollm2-135m",) if quick else ("smollm2-135m", "llama-3.2-1b")
    found: list[Point] = []
    for model in models:
        sizes = MODELS[model]._asdict()
        found += [{"step": "convert", "model": model, **sizes}]
        found += [{"step": "calibrate", "model": model, **sizes, "T": 1024}]
    return found


@lru_cache(maxsize=1)
def layer(sizes: Sizes) -> tuple[AttentionWeights, InputMoments, Tensor]:
    """Random weights in float32, moments of inputs that are not white, and frequencies."""
    D, H, G, d = sizes
    generator = torch.Generator().manual_seed(D)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = ((H * d, D), (G * d, D), (G * d, D), (D, H * d))
    weights = AttentionWeights(*(drawn(*shape) * shape[1] ** -0.5 for shape in rows))
    mixed = drawn(2 * D, D) * torch.linspace(0.1, 2.0, D)
    moments = InputMoments.from_second_moment(mixed.T @ mixed / len(mixed))
    frequencies = 1e5 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    return weights, moments, frequencies


def convert(sizes: Sizes, budget: float | tuple[int, int]) -> ConvertedLayer:
    weights, moments, frequencies = layer(sizes)
    return gqa_to_mla(
        weights,
        moments,
        num_heads=sizes.H,
        num_kv_heads=sizes.G,
        head_dim=sizes.d,
        inv_freq=frequencies,
        kv_budget=budget,
    )


def of(point: Point) -> Sizes:
    return Sizes(*(int(point[key]) for key in Sizes._fields))


def kept(sizes: Sizes) -> tuple[int, int]:
    """Rope and latent widths of 75 %, a quarter of them for rope."""
    total = 3 * sizes.G * sizes.d // 2
    rope = total // 8 * 2
    return rope, total - rope


def setup(point: Point, impl: str) -> Candidate:
    sizes = of(point)
    if impl == MOMENTS:
        T = int(point["T"])
        inputs, received = torch.randn(T, sizes.D), torch.rand(T)
        total = MomentSum(sizes.D, T)
        E = sizes.D + 1
        return Candidate(
            run=lambda: total.add(inputs, received, received),
            num_bytes=4 * inputs.numel(),
            num_flops=4 * T * E * E,
        )
    run: Callable[[], object]
    if impl == SVD:
        weights, rank = layer(sizes)[0], kept(sizes)[1]
        run = lambda: torch.svd_lowrank(torch.cat([weights.key, weights.value]), q=rank)  # noqa: E731
    else:
        budget: float | tuple[int, int] = 0.75 if impl == CONVERT else kept(sizes)
        run = lambda: convert(sizes, budget)  # noqa: E731

    def call() -> None:
        run()

    return Candidate(run=call)


def verify(sizes: Sizes) -> None:
    """Hold a conversion at full rank against the original attention in float64.

    Raises:
        GateError: it computes something else.
    """
    _, G, d = sizes[1:]
    found = convert(sizes, (G * d, G * d))
    converted = MultiheadLatentAttention(found.config, dtype=torch.float64)
    converted.load_state_dict({key: x.double() for key, x in found.state_dict.items()})
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, sizes.D, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        out = converted(x)
    gate({CONVERT: out}, expected=original(sizes, x), tolerance=1e-4, point={"D": sizes.D})


def original(sizes: Sizes, x: Tensor) -> Tensor:
    """Grouped-query attention of the layer, ``[1, L, D]``, with half-split RoPE."""
    _, H, G, d = sizes
    weights, _, frequencies = layer(sizes)
    query, key, value, output = (weight.double() for weight in weights[:4])
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies

    def heads(weight: Tensor, count: int, turned: bool) -> Tensor:
        rows = F.linear(x, weight).unflatten(-1, (count, d)).transpose(1, 2)
        return reference.rotate(rows, angles, "half") if turned else rows

    keys, values = heads(key, G, True), heads(value, G, False)
    keys, values = (part.repeat_interleave(H // G, dim=1) for part in (keys, values))
    out = F.scaled_dot_product_attention(heads(query, H, True), keys, values, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(2), output)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    sizes = of(point)
    impls: tuple[str, ...] = (MOMENTS,)
    if point["step"] == "convert":
        verify(sizes)
        impls = (SVD, SPLIT, CONVERT)
    rows = Comparison(impls=impls, setup=setup).rows_at(point, options, on_round)
    found: list[Row] = []
    for row in rows:
        new = {**row, "device": "cpu"}  # conversion computes on the CPU, in float64
        is_timed = baselines.clock(row) is not None
        found.append(with_peak(new, setup(point, str(row["impl"])).run) if is_timed else new)
    return found


BENCHMARK = Benchmark(
    name="conversion",
    title="Converting one layer of grouped-query attention, random weights",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "p20_ms", "p80_ms", "cpu_speedup", "speedup"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
