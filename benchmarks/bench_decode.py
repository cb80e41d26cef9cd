"""Absorbed decode attention over each of its sizes: ours against every other form that runs here.

One size changes at a time from 16 heads, one row of 4096 cached tokens, one query, plain rows,
dense: the context, the batch, the heads, the codec, the page (Z positions; 0: dense), the queries
of a row. On a CPU `cpp`, `torch` and the forms of `benchmarks.baselines`; on CUDA `triton`,
`torch`, those forms, and, over pages, the two-load scheme of `benchmarks.gpu_baseline` and the
engines that are installed (`benchmarks.engines`). `make gpu` times the kernels without their
launches instead.

    x_plain    times faster than the best absorbed form in plain PyTorch, FlexAttention's included
    x_heads    times faster than SDPA over keys and values of every head that stay in the cache

Both from the clock that load does not move: processor time of the busiest thread on a CPU, wall
time on CUDA. ``bytes_per_token`` is what the form caches for one token, ``peak_MiB`` what one call
takes beside its inputs and the cache.

Dims: B batch, L queries, H heads, S cached positions, Z positions in one page, C=512, R=64,
N=V=128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import baselines, engines, roofline
from benchmarks.baselines import FLEX, HEADS, IN_HEAD_SPACE, PLAIN, SCALE, C, Inputs, N, R, V
from benchmarks.harness import Candidate, Point
from benchmarks.memory import with_peak
from benchmarks.notes import skipped
from benchmarks.report import Row, Value
from benchmarks.sweep import TOLERANCES, Benchmark, Comparison, Options, main
from mla.codec import Codec, codec_from_spec
from mla.ops import mla_decode
from mla.ops.select import Impl
from mla.view import CacheView

NAME = "decode"
TWO_LOADS = "two loads"
BASE: dict[str, int | str] = {
    "dtype": "bfloat16", "H": 16, "B": 1, "S": 4096, "L": 1, "codec": "plain", "Z": 0
}  # fmt: skip
CODECS = ("fp8", "int8", "int4")


def points(quick: bool) -> list[Point]:
    changes: list[dict[str, Any]] = [{}, {"S": 1024}, {"B": 8, "S": 512}, {"L": 4, "S": 1024}]
    changes += [{"H": 128, "S": 1024}, {"Z": 64}]
    changes += [{"codec": kind} for kind in CODECS]
    if not quick:
        changes += [{"S": S} for S in (128, 512, 2048, 8192, 16384, 32768, 65536)]
        changes += [{"H": 128, "S": S} for S in (512, 2048, 4096, 8192, 16384)]
        changes += [{"B": B, "S": 1024} for B in (2, 4, 8, 16, 32, 64)]
        changes += [{"H": H} for H in (8, 20, 32, 64)] + [{"L": L} for L in (2, 4, 8)]
        changes += [{"Z": Z} for Z in (1, 16, 256)] + [{"Z": 64, "B": 16, "S": 1024}]
        changes += [{"codec": kind, "H": 128} for kind in CODECS]
        changes += [{"codec": kind, "S": 32768} for kind in CODECS]
        changes += [{"dtype": "float32", "S": S} for S in (1024, 4096, 16384)]
    found = [{**BASE, **change} for change in changes]
    return [point for index, point in enumerate(found) if point not in found[:index]]


@lru_cache(maxsize=1)
def _inputs(dtype: torch.dtype, H: int, B: int, S: int, L: int, codec: Codec) -> Inputs:
    return baselines.draw(dtype, B=B, H=H, S=S, L=L, codec=codec)


def of(point: Point) -> Inputs:
    H, B, S, L = (int(point[key]) for key in "HBSL")
    dtype = getattr(torch, str(point["dtype"]))
    return _inputs(dtype, H, B, S, L, codec_from_spec(str(point["codec"])))


def view_of(x: Inputs, codec: Codec, Z: int) -> CacheView:
    """The stored rows, dense or in pages of Z positions in random order."""
    if Z == 0:
        return CacheView.dense(x.stored, x.lengths, C=C, R=R, codec=codec)
    B, S, width = x.stored.shape
    M = -(-S // Z)
    order = torch.randperm(B * M, generator=torch.Generator().manual_seed(Z))
    rows = x.stored.new_zeros(B * M, Z, width)
    padded = x.stored.new_zeros(B, M * Z, width)
    padded[:, :S] = x.stored
    rows[order.to(rows.device)] = padded.view(B * M, Z, width)
    table = order.view(B, M).to(device=rows.device, dtype=torch.int32)
    return CacheView.paged(rows, table, x.lengths, C=C, R=R, codec=codec)


def ours(x: Inputs, view: CacheView) -> dict[str, Callable[[], Tensor]]:
    """Every implementation of the op that runs here."""
    found = {}
    for impl in baselines.ours_here("mla_decode", x.q_latent.dtype, view.codec.kind):
        found[impl] = _call(x, view, impl)
    return found


def _call(x: Inputs, view: CacheView, impl: str) -> Callable[[], Tensor]:
    name = cast(Impl, impl)
    return lambda: mla_decode(x.q_latent, x.q_rope, view, scale=SCALE, impl=name).out


def others(x: Inputs, view: CacheView) -> dict[str, Callable[[], Tensor]]:
    """Kernels of engines, and the scheme of their Triton kernels, where they take this case."""
    if view.page_table is None:
        return {}
    found: dict[str, Callable[[], Tensor]] = {}
    L = x.q_latent.shape[1]
    if view.rows.is_cuda and view.codec.kind == "plain" and L == 1:
        from benchmarks.gpu_baseline import two_load_decode

        found[TWO_LOADS] = lambda: two_load_decode(x.q_latent, x.q_rope, view, SCALE)
    for name, missing in engines.available().items():
        reason = missing or engines.refusal(name, view, L)
        run = None
        if reason is None:
            run, reason = engines.prepared(name, x.q_latent, x.q_rope, view, SCALE)
        if run is None:
            skipped(NAME, name, reason or "it cannot run")
        else:
            found[name] = run
    return found


def cost(point: Point, impl: str) -> roofline.Cost:
    """What a form must read, and what it computes."""
    B, S, L, H = (int(point[key]) for key in "BSLH")
    x = of(point)
    size = x.rows.itemsize
    pairs = roofline.causal_pairs(L, S)
    attention = 2 * B * H * (N + R + V) * pairs
    if impl in ("kept heads", "flex heads"):
        return roofline.Cost(B * S * bytes_per_token(point, impl), attention)
    if impl == "decompressed":
        expansion = roofline.expand(B * S, H, C, N, V, size=size)
        return roofline.Cost(x.rows.nbytes + x.kv_b.nbytes, expansion.num_flops + attention)
    row_bytes = bytes_per_token(point, impl)
    return roofline.decode(B, S, L, H, C, R, row_bytes=row_bytes, size=size, num_splits=1)


def bytes_per_token(point: Point, impl: str) -> int:
    """That the form caches in one layer."""
    x = of(point)
    if impl in ("kept heads", "flex heads"):
        return int(point["H"]) * (N + R + V) * x.rows.itemsize
    is_form = impl in PLAIN or impl in HEADS or impl in FLEX
    stored = x.rows if is_form else x.stored
    return stored.shape[-1] * stored.itemsize


def runs_at(point: Point, quick: bool) -> dict[str, Callable[[], Tensor]]:
    """Everything that is timed at a point, plain forms first."""
    x, codec = of(point), codec_from_spec(str(point["codec"]))
    view = view_of(x, codec, int(point["Z"]))
    names = tuple(PLAIN)
    if view.page_table is None and codec.kind == "plain":
        # Compiling takes seconds for each shape: a quick run has FlexAttention at one point.
        is_few = not quick or dict(point) == BASE
        names = (*PLAIN, *HEADS, *FLEX) if is_few else (*PLAIN, *HEADS)
    runs = baselines.forms(x, names, bench=NAME)
    return {**runs, **others(x, view), **ours(x, view)}


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    x, runs = of(point), runs_at(point, options.quick)
    tolerance = TOLERANCES[str(point["dtype"])]
    baselines.check_heads(x, runs, tolerance=tolerance, point=point)
    comparison = Comparison(
        impls=tuple(runs),
        setup=lambda point, impl: candidate(point, impl, runs[impl]),
        expected=lambda point: baselines.expected(x),
    )
    rows = comparison.rows_at(point, options, on_round)
    tokens = int(point["B"]) * int(point["L"])
    found: list[Row] = []
    for row in with_ratios(rows):
        impl, median = str(row["impl"]), row.get("median_ms")
        more = {
            "bytes_per_token": bytes_per_token(point, impl),
            "us_per_token": None if median is None else 1e3 * float(median) / tokens,
        }
        new = baselines.placed({**row, **more})
        found.append(new if median is None else with_peak(new, torch.no_grad()(runs[impl])))
    return found


def candidate(point: Point, impl: str, run: Callable[[], Tensor]) -> Candidate:
    num_bytes, num_flops, _ = cost(point, impl)

    @torch.no_grad()
    def call() -> Tensor | None:
        out = run()
        return None if impl in IN_HEAD_SPACE else out  # their result was checked before

    return Candidate(run=call, num_bytes=num_bytes, num_flops=num_flops)


def with_ratios(rows: list[dict[str, Value]]) -> list[dict[str, Value]]:
    """``x_plain`` and ``x_heads``, empty where there is nothing to compare with."""
    times = {str(row["impl"]): baselines.clock(row) for row in rows}
    plain = _best(times, (*PLAIN, "flex rows"))
    heads = _best(times, ("kept heads", "flex heads"))
    found = []
    for row in rows:
        time = times[str(row["impl"])]
        ratios = {"x_plain": plain, "x_heads": heads}
        more = {key: base / time if base and time else None for key, base in ratios.items()}
        found.append({**row, **more})
    return found


def _best(times: Mapping[str, float | None], names: tuple[str, ...]) -> float | None:
    return min((time for name in names if (time := times.get(name))), default=None)


BENCHMARK = Benchmark(
    name=NAME,
    title="Absorbed decode attention, C=512, R=64, one size at a time",
    points=points,
    rows_at=rows_at,
    hidden=(
        *("bytes", "flops", "rounds", "median_ms", "p20_ms", "p80_ms", "speedup", "cpu_speedup"),
        "bytes_per_token",
    ),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
