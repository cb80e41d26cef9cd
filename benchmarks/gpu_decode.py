"""Decode on a GPU: bytes/s where 16 heads are bound by memory, flop/s where 128 are not.

Points: batch 1 to 128 and 4K to 64K cached tokens, one to four queries, every codec, dense and
paged, against plain PyTorch and the scheme that engines ship (`benchmarks.gpu_baseline`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.gpu_measure import Task, in_turn, num_calls
from benchmarks.harness import Point, gate
from mla import reference
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec, rotate_latent
from mla.kernels import launch
from mla.ops import mla_decode
from mla.view import CacheView

C, R = 512, 64
SCALE = 192**-0.5
CODECS: dict[str, Codec] = {c.kind: c for c in (PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec())}
# Largest error against the oracle, relative to the largest value.
TOLERANCES = {"plain": 2e-2, "fp8": 2e-2, "int8": 2e-2, "int4": 2e-2}
DISTINCT = 4096  # coded rows that differ; a larger pool repeats them


def _point(impl: str, H: int, B: int, S: int, **changes: Any) -> dict[str, int | str]:
    return {"impl": impl, "H": H, "B": B, "S": S, "L": 1, "codec": "plain", "Z": 64, **changes}


def points() -> list[Point]:
    """Those with a goal first."""
    found = [_point("triton", 16, B, S) for B in (64, 128) for S in (4096, 8192, 16384, 32768)]
    found += [_point("triton", 16, 1, 65536), _point("engines", 16, 1, 65536)]
    found += [_point("triton", 128, B, S) for B in (64, 128) for S in (4096, 8192, 32768)]
    found += [_point("engines", 128, B, S) for B, S in ((64, 4096), (128, 4096), (64, 32768))]
    found += [_point("engines", 16, 64, 4096), _point("torch", 16, 64, 4096)]
    found += [_point("torch", 128, 64, 4096)]
    for kind in ("fp8", "int8", "int4"):
        for H, B, S in ((16, 64, 8192), (16, 128, 32768), (16, 1, 65536), (128, 64, 8192)):
            found.append(_point("triton", H, B, S, codec=kind))
    found += [_point("triton", 16, 64, 8192, L=L) for L in (2, 4)]
    found += [_point("triton", 128, 64, 8192, L=2)]
    found += [_point("triton", 16, 64, 8192, Z=Z) for Z in (0, 1, 16)]
    found += [_point("triton", 16, B, S) for B, S in ((1, 4096), (1, 32768), (8, 8192), (32, 8192))]
    found += [_point("triton", H, 64, 8192) for H in (20, 32, 64)]
    return found


def cost(point: Point) -> roofline.Cost:
    """Bytes and flops of a point, partial results apart."""
    B, S, L, H = (int(point[key]) for key in "BSLH")
    codec = CODECS[str(point["codec"])]
    row_bytes = codec.row_width(C, R) * codec.storage_dtype(torch.bfloat16).itemsize
    num_splits = 1
    if point["impl"] == "triton":
        architecture = "sm90"
        if torch.cuda.is_available():
            architecture = launch.architecture(torch.device("cuda"))
        plan = launch.decode_plan(architecture, L * H, C, R, torch.bfloat16, codec)
        num_splits = plan.num_splits(S)
    elif point["impl"] == "engines":
        from benchmarks.gpu_baseline import NUM_SPLITS as num_splits
    return roofline.decode(B, S, L, H, C, R, row_bytes=row_bytes, size=2, num_splits=num_splits)


def prepare(point: Point) -> Task:
    """The call to time, on random rows."""
    B, S, L, H, Z = (int(point[key]) for key in "BSLHZ")
    device, codec, impl = torch.device("cuda"), CODECS[str(point["codec"])], str(point["impl"])
    queries = _queries(B, L, H, torch.Generator(device).manual_seed(1), (C, R))
    if impl == "torch":
        view = make_view(B, S, Z, codec, device, (C, R))
        return Task(_call(impl, *queries, view), cost(point), capture=False)
    calls = num_calls(cost(point))
    views = [make_view(B, S, Z, codec, device, (C, R)) for _ in range(calls)]
    run = in_turn([_call(impl, *queries, view) for view in views])
    return Task(run, cost(point), calls=calls)


def verify(point: Point) -> None:
    """Hold a small ragged case of the same kernel against the oracle in float64.

    Raises:
        GateError: the implementation computes something else.
    """
    device = torch.device("cpu" if launch.is_interpreting() else "cuda")
    H, L, Z = (int(point[key]) for key in "HLZ")
    lengths = [70, 17, 64] if launch.is_interpreting() else [1300, 17, 512]
    codec = CODECS[str(point["codec"])]
    sizes = (32, 16) if launch.is_interpreting() else (C, R)
    view = make_view(3, max(lengths), Z, codec, device, sizes)
    view.lengths.copy_(torch.tensor(lengths))
    q_latent, q_rope = _queries(3, L, H, torch.Generator(device).manual_seed(2), sizes)
    found = _call(str(point["impl"]), q_latent, q_rope, view)()
    gate(
        {str(point["impl"]): found},
        expected=_expected(q_latent, q_rope, view),
        tolerance=TOLERANCES[codec.kind],
        point={key: point[key] for key in ("H", "L", "Z", "codec")},
    )


def verify_key(point: Point) -> tuple[Any, ...]:
    """Points with the same key run the same kernel."""
    return tuple(point[key] for key in ("impl", "H", "L", "codec", "Z"))


def make_view(
    B: int, S: int, Z: int, codec: Codec, device: torch.device, sizes: tuple[int, int]
) -> CacheView:
    """A full cache of random bfloat16 rows, pages in random order; Z = 0: dense."""
    width, rope = sizes
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    page = Z or S
    num_pages = B * -(-S // page)
    shape = (num_pages * page, width + rope)
    distinct = min(shape[0], DISTINCT if codec.kind != "plain" else shape[0])
    drawn = torch.randn(
        distinct, shape[1], device=device, generator=generator, dtype=torch.bfloat16
    )
    rows = codec.encode(drawn[:, :width], drawn[:, width:])
    if distinct < shape[0]:
        rows = rows.repeat(-(-shape[0] // distinct), 1)[: shape[0]]
    rows = rows.unflatten(0, (num_pages, page))
    if Z == 0:
        return CacheView.dense(rows, lengths, C=width, R=rope, codec=codec)
    order = torch.randperm(num_pages, generator=generator, device=device).to(torch.int32)
    return CacheView.paged(rows, order.view(B, -1), lengths, C=width, R=rope, codec=codec)


def _queries(
    B: int, L: int, H: int, generator: torch.Generator, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    shape = (B, L, H, sum(sizes))
    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    q_latent, q_rope = drawn.split(list(sizes), dim=-1)
    return q_latent.contiguous(), q_rope.contiguous()


def _call(impl: str, q_latent: Tensor, q_rope: Tensor, view: CacheView) -> Callable[[], Tensor]:
    if impl == "engines":
        from benchmarks.gpu_baseline import two_load_decode

        return lambda: two_load_decode(q_latent, q_rope, view, SCALE)
    name: Any = impl
    return lambda: mla_decode(q_latent, q_rope, view, scale=SCALE, impl=name).out


def _expected(q_latent: Tensor, q_rope: Tensor, view: CacheView) -> Tensor:
    """The oracle on the rows as `mla.codec` reads them."""
    rows = view.codec.decode(view.rows.cpu(), view.C, view.R, torch.float64)
    if view.page_table is not None:
        rows = rows[view.page_table.cpu().long()].flatten(1, 2)
    latent, k_rope = rows.split([view.C, view.R], dim=-1)
    if view.codec.rotation:
        latent = rotate_latent(latent)
    queries = (q_latent.cpu().double(), q_rope.cpu().double())
    lengths = view.lengths.cpu()
    out = reference.absorbed_attention(*queries, latent, k_rope, lengths, scale=SCALE).out
    return out.to(q_latent.device)
