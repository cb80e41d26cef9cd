"""Merging partial attention results of X key splits into one, weighted by their log-sum-exp.

    plain    the formula in PyTorch: logsumexp, exp, one sum
    torch    impl="torch"; triton: impl="triton" on CUDA

Dims: X parts, B batch, H heads, C=512, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import C
from benchmarks.harness import Candidate, Point
from benchmarks.memory import with_peak
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import reference
from mla.ops import merge_partials
from mla.ops.select import Impl

PLAIN = "plain"


def points(quick: bool) -> list[Point]:
    shapes = [(4, 1, 16), (16, 1, 128)]
    if not quick:
        shapes += [(2, 64, 16), (8, 64, 16), (8, 16, 128), (128, 1, 16)]
    return [{"X": X, "B": B, "H": H} for X, B, H in shapes]


@lru_cache(maxsize=1)
def inputs(X: int, B: int, H: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(X)
    out = torch.randn(X, B, 1, H, C, generator=generator)
    lse = 4 * torch.randn(X, B, 1, H, generator=generator)
    return out.to(baselines.device()), lse.to(baselines.device())


def of(point: Point) -> tuple[Tensor, Tensor]:
    return inputs(*(int(point[key]) for key in "XBH"))


def plain(out: Tensor, lse: Tensor) -> Tensor:
    return torch.einsum("xblh,xblhc->blhc", lse.softmax(dim=0), out)


def call(point: Point, impl: str) -> Callable[[], Tensor]:
    out, lse = of(point)
    if impl == PLAIN:
        return lambda: plain(out, lse)
    name = cast(Impl, impl)
    return lambda: merge_partials(out, lse, impl=name).out


def setup(point: Point, impl: str) -> Candidate:
    out, lse = of(point)
    X = out.shape[0]
    num_bytes = out.nbytes + lse.nbytes + (out.nbytes + lse.nbytes) // X
    return Candidate(
        run=torch.no_grad()(call(point, impl)), num_bytes=num_bytes, num_flops=3 * out.numel()
    )


def expected(point: Point) -> Tensor:
    merged: Tensor = reference.merge_partials(*(x.double() for x in of(point))).out
    return merged


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    impls = (PLAIN, *baselines.ours_here("merge_partials", torch.float32))
    comparison = Comparison(impls=impls, setup=setup, expected=expected)
    rows = comparison.rows_at(point, options, on_round)
    return [with_peak(baselines.placed(row), call(point, str(row["impl"]))) for row in rows]


BENCHMARK = Benchmark(
    name="merge",
    title="Merging partial results, C=512, float32",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "p20_ms", "p80_ms", "cpu_speedup"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
