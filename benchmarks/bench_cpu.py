"""Absorbed decode attention on a CPU: ours against plain PyTorch in its best forms.

Candidates take turns in one process. `peak` is what the registers of this processor reach in the
same run, a loop of multiply-adds without memory; shares of it are per thread, from processor time
of the busiest one. Beside other load a hyper-thread's peak falls with its neighbour's work: then
shares can pass 1, and only ratios mean something.

    bmm, einsum, sdpa rows, decompressed: see `benchmarks.baselines`
    torch        impl="torch"
    cpp          impl="cpp"
    int8, int4   impl="cpp" on coded rows
    cpp alone    impl="cpp", calls one after another: rows that fit stay in the processor's caches

Dims: B batch, H heads, S cached positions, C=512, R=64, N=V=128.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from statistics import median

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import HEADS, MAX_EXPANDED, PLAIN, SCALE, C, Inputs, N, R, V
from benchmarks.harness import Candidate, Point, measure
from benchmarks.report import Row
from benchmarks.sweep import TOLERANCES, Benchmark, Comparison, Options, main
from mla.codec import Codec, Int4Codec, Int8Codec, PlainCodec
from mla.kernels import cpu
from mla.ops import mla_decode
from mla.view import CacheView

ALONE, CALLS = "cpp alone", 10
CODED: dict[str, Codec] = {"int8": Int8Codec(), "int4": Int4Codec()}


def points(quick: bool) -> list[Point]:
    if quick:
        shapes = [(16, 1, 4096), (128, 1, 4096), (16, 1, 128)]
    else:
        lengths = (1, 128, 512, 4096, 16384)
        shapes = [(H, 1, S) for H, S in product((1, 8, 16, 20, 64, 128), lengths)]
        shapes += [(16, B, 4096) for B in (4, 16, 64)] + [(128, 4, 16384)]
    return [
        {"dtype": dtype, "H": H, "B": B, "S": S}
        for dtype in ("bfloat16", "float32")
        for H, B, S in shapes
    ]


@lru_cache(maxsize=1)
def inputs(dtype: torch.dtype, H: int, B: int, S: int) -> Inputs:
    return baselines.draw(dtype, B=B, H=H, S=S)


def of(point: Point) -> Inputs:
    return inputs(
        getattr(torch, str(point["dtype"])), int(point["H"]), int(point["B"]), int(point["S"])
    )


def _ours(x: Inputs, impl: str) -> Callable[[], Tensor]:
    codec = CODED.get(impl, PlainCodec())
    rows = codec.encode(*x.rows.split([C, R], dim=-1))
    view = CacheView.dense(rows, x.lengths, C=C, R=R, codec=codec)
    name = "torch" if impl == "torch" else "cpp"
    return lambda: mla_decode(x.q_latent, x.q_rope, view, scale=SCALE, impl=name).out


def setup(point: Point, impl: str) -> Candidate:
    x = of(point)
    H, B, S = int(point["H"]), int(point["B"]), int(point["S"])
    form = {**PLAIN, **HEADS}.get(impl)
    call = _ours(x, impl) if form is None else form(x)

    def run() -> Tensor | None:
        out = call()
        return None if impl in HEADS else out  # nothing absorbed to compare: in head space

    flops = 2 * B * H * S * (2 * C + R)
    return Candidate(run=torch.no_grad()(run), num_flops=flops, num_bytes=x.rows.nbytes)


def expected(point: Point) -> Tensor | None:
    return baselines.expected(of(point))


def peak(dtype: str) -> float:
    """GFLOP/s of one thread in registers, bfloat16 products where the kernels use them."""
    is_bf16 = dtype == "bfloat16" and "avx512bf16" in cpu.describe().instruction_sets
    start = time.thread_time()
    flops = cpu.run_peak(500_000, bf16=is_bf16)
    return flops / (time.thread_time() - start) / 1e9


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    H, B, S = (int(point[key]) for key in "HBS")
    names = [*PLAIN, "torch", "cpp"]
    if B * H * S * (N + V) <= MAX_EXPANDED:
        names.append("decompressed")
        runs = {"decompressed": baselines.decompressed(of(point))}
        tolerance = TOLERANCES[str(point["dtype"])]
        baselines.check_heads(of(point), runs, tolerance=tolerance, point=point)
    comparison = Comparison(impls=tuple(names), setup=setup, expected=expected)
    peaks = [peak(str(point["dtype"])) for _ in range(3)]

    def after_round() -> None:
        peaks.append(peak(str(point["dtype"])))
        on_round()

    rows = comparison.rows_at(point, options, after_round)
    times = {str(row["impl"]): float(row["cpu_ms"] or 0) for row in rows}
    best = min(times[name] for name in PLAIN)
    coded = measure(
        {impl: setup(point, impl) for impl in ("cpp", *CODED)}, rounds=options.rounds, seconds=10.0
    )
    own = median(coded["cpp"].cpu)
    call = setup(point, "cpp").run
    repeated = Candidate(run=lambda: [call() for _ in range(CALLS)][-1], units=CALLS)
    alone = measure({ALONE: repeated}, rounds=options.rounds, seconds=10.0)[ALONE]
    register = median(peaks)

    def figures(row: Row, cpu_ms: float) -> Row:
        gflops = 2 * B * H * S * (2 * C + R) / (cpu_ms * 1e6)
        return {
            **row,
            "cpu_ms": cpu_ms,
            "gflops": gflops,
            "share": gflops / (register * torch.get_num_threads()),
            "x_plain": best / cpu_ms,
            "x_stock": times["decompressed"] / cpu_ms if "decompressed" in times else None,
        }

    shown = [figures(row, times[str(row["impl"])]) for row in rows]
    for name in CODED:
        # Timed against our own plain rows, in turns with them.
        ratio = own / median(coded[name].cpu)
        shown.append({**figures({**point, "impl": name}, times["cpp"] / ratio), "x_rows": ratio})
    shown.append(figures({**point, "impl": ALONE}, 1e3 * median(alone.cpu)))
    return [{**row, "peak_gflops": register} for row in shown]


def reason_absent() -> str | None:
    """Why this cannot run here, or None."""
    if torch.cuda.is_available():
        return "its figures are of a CPU; bench_decode takes the GPU"
    return cpu.reason_absent()


BENCHMARK = Benchmark(
    name="cpu",
    title="Absorbed decode attention on a CPU, C=512, R=64",
    points=points,
    rows_at=rows_at,
    reason_absent=reason_absent,
    hidden=(
        *("bytes", "flops", "rounds", "median_ms", "p20_ms", "p80_ms", "speedup", "cpu_speedup"),
        "peak_gflops",
    ),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
