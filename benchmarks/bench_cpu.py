"""Absorbed decode attention on a CPU: ours against plain PyTorch in its best forms.

Candidates take turns in one process. `peak` is what the registers of this processor reach in the
same run, a loop of multiply-adds without memory; shares of it are per thread, from processor time
of the busiest one. Beside other load a hyper-thread's peak falls with its neighbour's work: then
shares can pass 1, and only ratios mean something.

    bmm          scores and values as two batched products over the rows
    einsum       the same as einsum, softmax in float32
    sdpa rows    heads as query rows of one key head, values padded to the key width
    decompressed keys and values of every head expanded at each step, then SDPA (transformers)
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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Candidate, Point, measure
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import reference
from mla.codec import Codec, Int4Codec, Int8Codec, PlainCodec
from mla.kernels import cpu
from mla.ops import mla_decode
from mla.view import CacheView

C, R, N, V = 512, 64, 128, 128
SCALE = (N + R) ** -0.5
ALONE, CALLS = "cpp alone", 10
MAX_EXPANDED = 1 << 28  # elements of expanded keys; beyond, expanding takes seconds and gigabytes
CODED: dict[str, Codec] = {"int8": Int8Codec(), "int4": Int4Codec()}


class Inputs(NamedTuple):
    q_latent: Tensor  # [B, 1, H, C]
    q_rope: Tensor  # [B, 1, H, R]
    rows: Tensor  # [B, S, C+R]
    lengths: Tensor  # [B] int32
    q_nope: Tensor  # [B, 1, H, N]
    kv_b: Tensor  # [H*(N+V), C]


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
    """Queries that are the absorbed ones of some expanded queries, so that all forms agree."""
    rng = torch.Generator().manual_seed(S)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    kv_b = drawn(H * (N + V), C) * C**-0.5
    q_nope = drawn(B, 1, H, N)
    q_latent = torch.einsum("blhn,hnc->blhc", q_nope, kv_b.view(H, N + V, C)[:, :N])
    q_rope, rows = drawn(B, 1, H, R), drawn(B, S, C + R)
    lengths = torch.full((B,), S, dtype=torch.int32)
    return Inputs(*(x.to(dtype) for x in (q_latent, q_rope, rows)), lengths, q_nope.to(dtype),
                  kv_b.to(dtype))  # fmt: skip


def of(point: Point) -> Inputs:
    return inputs(
        getattr(torch, str(point["dtype"])), int(point["H"]), int(point["B"]), int(point["S"])
    )


def _bmm(x: Inputs) -> Tensor:
    query = torch.cat([x.q_latent, x.q_rope], dim=-1)[:, 0]
    scores = torch.bmm(query, x.rows.transpose(1, 2)).float().mul_(SCALE)
    return torch.bmm(scores.softmax(-1).to(query.dtype), x.rows)[..., :C]


def _einsum(x: Inputs) -> Tensor:
    latent, k_rope = x.rows.split([C, R], dim=-1)
    scores = torch.einsum("blhc,bsc->blhs", x.q_latent, latent)
    scores = scores + torch.einsum("blhr,bsr->blhs", x.q_rope, k_rope)
    weights = (SCALE * scores.float()).softmax(-1).to(latent.dtype)
    return torch.einsum("blhs,bsc->blhc", weights, latent)[:, 0]


def _sdpa_rows(x: Inputs) -> Tensor:
    query = torch.cat([x.q_latent, x.q_rope], dim=-1)
    keys = x.rows[:, None]
    return F.scaled_dot_product_attention(query, keys, keys, scale=SCALE)[:, 0, :, :C]


def _decompressed(x: Inputs) -> None:
    """As transformers decodes: no absorbed result to compare, the output is in head space."""
    latent, k_rope = x.rows.split([C, R], dim=-1)
    H = x.q_nope.shape[2]
    expanded = F.linear(latent, x.kv_b).unflatten(-1, (H, N + V)).transpose(1, 2)
    keys, values = expanded.split([N, V], dim=-1)
    keys = torch.cat([keys, k_rope[:, None].expand(-1, H, -1, -1)], dim=-1)
    query = torch.cat([x.q_nope, x.q_rope], dim=-1).transpose(1, 2)
    F.scaled_dot_product_attention(query, keys, values, scale=SCALE)


def _ours(x: Inputs, impl: str) -> Callable[[], Tensor]:
    codec = CODED.get(impl, PlainCodec())
    rows = codec.encode(*x.rows.split([C, R], dim=-1))
    view = CacheView.dense(rows, x.lengths, C=C, R=R, codec=codec)
    name = "torch" if impl == "torch" else "cpp"
    return lambda: mla_decode(x.q_latent, x.q_rope, view, scale=SCALE, impl=name).out[:, 0]


PLAIN: dict[str, Callable[[Inputs], Tensor]] = {
    "bmm": _bmm,
    "einsum": _einsum,
    "sdpa rows": _sdpa_rows,
}


def setup(point: Point, impl: str) -> Candidate:
    x = of(point)
    H, B, S = int(point["H"]), int(point["B"]), int(point["S"])
    flops = 2 * B * H * S * (2 * C + R)
    num_bytes = x.rows.nbytes
    run: Callable[[], Tensor | None]
    if impl in PLAIN:
        run = lambda: PLAIN[impl](x)  # noqa: E731
    elif impl == "decompressed":
        run = lambda: _decompressed(x)  # noqa: E731
    else:
        run = _ours(x, impl)
    return Candidate(run=torch.no_grad()(run), num_flops=flops, num_bytes=num_bytes)


def expected(point: Point) -> Tensor | None:
    x, S = of(point), int(point["S"])
    if S * int(point["B"]) > 4096:
        return None
    latent, k_rope = x.rows.double().split([C, R], dim=-1)
    queries = (x.q_latent.double(), x.q_rope.double())
    out: Tensor = reference.absorbed_attention(
        *queries, latent, k_rope, x.lengths, scale=SCALE
    ).out[:, 0]
    return out


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


BENCHMARK = Benchmark(
    name="cpu",
    title="Absorbed decode attention on a CPU, C=512, R=64",
    points=points,
    rows_at=rows_at,
    hidden=(
        *("bytes", "flops", "rounds", "median_ms", "p20_ms", "p80_ms", "speedup", "cpu_speedup"),
        "peak_gflops",
    ),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
