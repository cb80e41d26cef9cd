"""Writing new tokens into the cache: plain and fused, every codec, dense and in pages.

    torch   impl="torch"
    cpp     impl="cpp"; triton: impl="triton" on CUDA
    separate steps    norm and rotation in plain PyTorch, then impl of the plain form (fused alone)
    index copy        plain rows written by indexing, the least that PyTorch can do (plain alone)

`append` stores latents and keys that are finished; `fused` takes the output of the projection and
does norm, rotation and storing in one pass. Times are of one call with B rows of L tokens each.
What is stored is read back and held against the oracle's rows.

Dims: B batch, L new tokens, Z positions in one page (0: dense), C=512, R=64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from benchmarks import baselines, roofline
from benchmarks.baselines import C, R
from benchmarks.harness import Candidate, Point, gate
from benchmarks.memory import with_peak
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import reference
from mla.codec import Codec, codec_from_spec
from mla.ops import mla_append, mla_norm_rope_append
from mla.ops.select import Impl
from mla.rope import rotate
from mla.view import CacheView

EPS = 1e-6
BEFORE = 64  # tokens that are there already
INDEX_COPY, SEPARATE = "index copy", "separate steps"
# Half a step of the codec, relative to the largest value of its group, and some room.
TOLERANCES = {"plain": 1e-2, "fp8": 7e-2, "int8": 1e-2, "int4": 2e-1}


class Inputs(NamedTuple):
    kv_a: Tensor  # [B, L, C+R]
    weight: Tensor  # [C]
    cos: Tensor  # [B, L, R/2]
    sin: Tensor


def points(quick: bool) -> list[Point]:
    shapes = [(1, 1, 0), (1, 512, 64), (16, 1, 64)]
    if not quick:
        shapes += [(1, 4096, 64), (64, 1, 64), (64, 64, 64), (1, 512, 0)]
    kinds = ("plain", "fp8", "int8", "int4")
    return [
        {"form": form, "dtype": "bfloat16", "codec": kind, "B": B, "L": L, "Z": Z}
        for form in ("append", "fused")
        for B, L, Z in shapes
        for kind in (kinds if (B, L) == (1, 512) or not quick else ("plain", "int8"))
    ]


def impls_at(point: Point) -> tuple[str, ...]:
    """The first is the baseline."""
    dtype = getattr(torch, str(point["dtype"]))
    own = baselines.ours_here("mla_append", dtype, str(point["codec"]))
    if point["form"] == "fused":
        return (SEPARATE, *own)
    return (INDEX_COPY, *own) if point["codec"] == "plain" else own


@lru_cache(maxsize=1)
def inputs(dtype: torch.dtype, B: int, L: int) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    kv_a = torch.randn(B, L, C + R, generator=generator)
    weight = 1 + 0.1 * torch.randn(C, generator=generator)
    angles = 3 * torch.randn(B, L, R // 2, generator=generator)
    drawn = (kv_a, weight, angles.cos(), angles.sin())
    return Inputs(*(x.to(device=baselines.device(), dtype=dtype) for x in drawn))


def of(point: Point) -> Inputs:
    return inputs(getattr(torch, str(point["dtype"])), int(point["B"]), int(point["L"]))


def view_of(point: Point) -> CacheView:
    """A cache with room for the new tokens behind BEFORE others, pages in random order."""
    B, L, Z = (int(point[key]) for key in "BLZ")
    codec, x = codec_from_spec(str(point["codec"])), of(point)
    like = codec.encode(x.kv_a[:1, :1, :C], x.kv_a[:1, :1, C:])
    lengths = torch.full((B,), BEFORE + L, dtype=torch.int32, device=like.device)
    if Z == 0:
        rows = like.new_zeros(B, BEFORE + L, like.shape[-1])
        return CacheView.dense(rows, lengths, C=C, R=R, codec=codec)
    M = -(-(BEFORE + L) // Z)
    order = torch.randperm(B * M, generator=torch.Generator().manual_seed(0))
    table = order.view(B, M).to(device=like.device, dtype=torch.int32)
    rows = like.new_zeros(B * M, Z, like.shape[-1])
    return CacheView.paged(rows, table, lengths, C=C, R=R, codec=codec)


def stored(view: CacheView, L: int) -> Tensor:
    """``[B, L, C+R]`` float64, the new rows as the codec reads them back."""
    rows = view.rows
    if view.page_table is not None:
        rows = rows[view.page_table.long()].flatten(1, 2)
    return baselines.decoded(rows[:, BEFORE : BEFORE + L], view.codec, torch.float64)


def expected(point: Point) -> Tensor:
    """``[B, L, C+R]``, what the new rows stand for."""
    kv_a, weight, cos, sin = (x.cpu().double() for x in of(point))
    if point["form"] == "append":
        return kv_a
    angles = torch.atan2(sin, cos)
    latent = reference.rms_norm(kv_a[..., :C], weight, EPS)
    return torch.cat([latent, reference.rotate(kv_a[..., C:], angles, "interleaved")], dim=-1)


def call(point: Point, impl: str, view: CacheView) -> Callable[[], None]:
    x = of(point)
    if impl == INDEX_COPY:
        return _index_copy(x.kv_a, view)
    if impl == SEPARATE:
        return lambda: _separate(x, view)
    name = cast(Impl, impl)
    if point["form"] == "append":
        latent, k_rope = x.kv_a.split([C, R], dim=-1)
        return lambda: mla_append(view, latent, k_rope, impl=name)

    def fused() -> None:
        mla_norm_rope_append(view, *x, eps=EPS, pairing="interleaved", impl=name)

    return fused


def _index_copy(new: Tensor, view: CacheView) -> Callable[[], None]:
    """Places are prepared: an engine keeps them for all layers."""
    B, L, _ = new.shape
    position = torch.arange(BEFORE, BEFORE + L, device=new.device).expand(B, L)
    page, slot = torch.arange(B, device=new.device)[:, None].expand(B, L), position
    if view.page_table is not None:
        Z = view.rows.shape[1]
        page, slot = view.page_table.long().gather(1, position // Z), position % Z

    def run() -> None:
        view.rows[page, slot] = new

    return run


def _separate(x: Inputs, view: CacheView) -> None:
    latent = torch.nn.functional.rms_norm(x.kv_a[..., :C], (C,), x.weight, EPS)
    mla_append(view, latent, rotate(x.kv_a[..., C:], x.cos, x.sin, "interleaved"))


def setup(point: Point, impl: str) -> Candidate:
    codec: Codec = codec_from_spec(str(point["codec"]))
    size, tokens = of(point).kv_a.itemsize, int(point["B"]) * int(point["L"])
    row_bytes = codec.row_width(C, R) * codec.storage_dtype(of(point).kv_a.dtype).itemsize
    is_fused = point["form"] == "fused"
    cost = roofline.append(tokens, C, R, row_bytes=row_bytes, size=size, fused=is_fused)
    return Candidate(run=call(point, impl, view_of(point)), num_bytes=cost.num_bytes)


def verify(point: Point, impl: str) -> None:
    """Hold what is stored against the oracle.

    Raises:
        GateError: something else was stored.
    """
    view = view_of(point)
    call(point, impl, view)()
    gate(
        {impl: stored(view, int(point["L"])).cpu()},
        expected=expected(point),
        tolerance=TOLERANCES[str(point["codec"])],
        point=point,
    )


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    impls = impls_at(point)
    for impl in impls:
        verify(point, impl)
    found: list[Row] = []
    tokens = int(point["B"]) * int(point["L"])
    for row in Comparison(impls=impls, setup=setup).rows_at(point, options, on_round):
        time = baselines.clock(row)
        new = baselines.placed({**row, "us_per_token": 1e3 * time / tokens if time else None})
        run = call(point, str(row["impl"]), view_of(point))
        found.append(with_peak(new, run) if time else new)
    return found


BENCHMARK = Benchmark(
    name="append",
    title="Writing new tokens into the cache, C=512, R=64",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "p20_ms", "p80_ms", "cpu_speedup"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
