"""What pages cost a decode step: reading through a table, and checking its page numbers first.

On a CPU every page number in use is checked before a row is touched. A call whose table has a wrong
number first is refused after that check, without attention; refused calls with the whole table and
with one page differ by the check of all pages and nothing else.

    check_us        refused with all pages less refused with one page; reads the table from memory,
                    where the attention behind it finds it in the cache
    check_share     of the paged decode step, by processor time
    over_dense      paged over dense, the same rows

On CUDA tables are not read by the host: there is no check, and only the first two rows are timed.

Dims: B batch, S cached positions, Z positions in one page, H=16, C=512, R=64, bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks import baselines, roofline
from benchmarks.baselines import SCALE, C, Inputs, R
from benchmarks.bench_decode import view_of
from benchmarks.harness import Candidate, Point
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla.checks import ShapeError
from mla.codec import PlainCodec
from mla.ops import mla_decode
from mla.view import CacheView

H = 16
DENSE, PAGED, ALL, ONE = "dense", "paged", "refused, all pages", "refused, one page"
CALLS = 20  # refused calls that are timed together: microseconds each


def points(quick: bool) -> list[Point]:
    shapes = [(1, 4096, 64), (16, 1024, 16)]
    if not quick:
        shapes += [(1, 4096, 1), (1, 4096, 16), (1, 65536, 16), (1, 65536, 64), (64, 1024, 64)]
    return [{"dtype": "bfloat16", "B": B, "S": S, "Z": Z} for B, S, Z in shapes]


@lru_cache(maxsize=1)
def inputs(dtype: torch.dtype, B: int, S: int) -> Inputs:
    return baselines.draw(dtype, B=B, H=H, S=S)


def of(point: Point) -> Inputs:
    dtype = getattr(torch, str(point["dtype"]))
    return inputs(dtype, int(point["B"]), int(point["S"]))


def refused(view: CacheView, *, pages: int | None) -> CacheView:
    """The view with a wrong first page number, and so many pages in its only or every row."""
    assert view.page_table is not None
    table = view.page_table.clone()
    table[0, 0] = -1
    if pages is None:
        return replace(view, page_table=table)
    lengths = torch.zeros_like(view.lengths)
    lengths[0] = pages * view.rows.shape[1]
    return replace(view, page_table=table, lengths=lengths)


def setup(point: Point, impl: str) -> Candidate:
    x = of(point)
    view = view_of(x, PlainCodec(), 0 if impl == DENSE else int(point["Z"]))
    if impl in (DENSE, PAGED):
        B, S, width = x.stored.shape
        row_bytes, size = width * x.stored.itemsize, x.stored.itemsize
        cost = roofline.decode(B, S, 1, H, C, R, row_bytes=row_bytes, size=size, num_splits=1)
        return Candidate(
            run=lambda: decode(x, view), num_bytes=cost.num_bytes, num_flops=cost.num_flops
        )
    bad = refused(view, pages=None if impl == ALL else 1)

    def run() -> None:
        for _ in range(CALLS):
            with suppress(ShapeError):
                decode(x, bad)

    return Candidate(run=run, units=CALLS)


def decode(x: Inputs, view: CacheView) -> Tensor:
    return mla_decode(x.q_latent, x.q_rope, view, scale=SCALE).out


def impls_here() -> tuple[str, ...]:
    return (DENSE, PAGED, ALL, ONE) if baselines.device().type == "cpu" else (DENSE, PAGED)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    comparison = Comparison(
        impls=impls_here(), setup=setup, expected=lambda point: baselines.expected(of(point))
    )
    rows = comparison.rows_at(point, options, on_round)
    times = {str(row["impl"]): baselines.clock(row) or 0.0 for row in rows}
    check = times[ALL] - times[ONE] if ALL in times else None
    found: list[Row] = []
    for row in rows:
        more: dict[str, float | None] = {"over_dense": None, "check_us": None, "check_share": None}
        if row["impl"] == PAGED and times[PAGED] and times[DENSE]:
            more["over_dense"] = times[PAGED] / times[DENSE]
            if check is not None:
                more |= {"check_us": 1e3 * check, "check_share": check / times[PAGED]}
        found.append(baselines.placed({**row, **more}))
    return found


BENCHMARK = Benchmark(
    name="paging",
    title="Pages in a decode step, 16 heads, C=512, R=64",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "p20_ms", "p80_ms", "cpu_speedup", "speedup"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
