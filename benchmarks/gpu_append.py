"""Appending 4096 new tokens on a GPU: bytes/s of the plain and of the fused form, every codec."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.gpu_decode import CODECS, make_view
from benchmarks.gpu_measure import Task, in_turn, num_calls
from benchmarks.harness import Point, gate
from mla import reference
from mla.codec import rotate_latent
from mla.kernels import launch
from mla.ops import mla_append, mla_norm_rope_append
from mla.view import CacheView

C, R = 512, 64
EPS = 1e-6
# Half a step of the codec, relative to the largest value of its group, and some room.
TOLERANCES = {"plain": 1e-2, "fp8": 7e-2, "int8": 1e-2, "int4": 2e-1}


def points() -> list[Point]:
    found: list[Point] = []
    for form in ("append", "fused"):
        for kind in CODECS:
            for B, L in ((1, 4096), (64, 64), (4096, 1)):
                found.append({"impl": "triton", "form": form, "codec": kind, "B": B, "L": L})
        for kind in ("plain", "fp8"):
            found.append({"impl": "torch", "form": form, "codec": kind, "B": 1, "L": 4096})
    return found


def cost(point: Point) -> roofline.Cost:
    codec = CODECS[str(point["codec"])]
    row_bytes = codec.row_width(C, R) * codec.storage_dtype(torch.bfloat16).itemsize
    num_tokens = int(point["B"]) * int(point["L"])
    is_fused = point["form"] == "fused"
    return roofline.append(num_tokens, C, R, row_bytes=row_bytes, size=2, fused=is_fused)


def prepare(point: Point) -> Task:
    """The call to time: all tokens of one step, paged, to the end of rows of L + 64 positions."""
    B, L = int(point["B"]), int(point["L"])
    device = torch.device("cuda")
    is_captured = point["impl"] == "triton"
    calls = num_calls(cost(point)) if is_captured else 1

    def one() -> Callable[[], None]:
        view = make_view(B, L + 64, 64, CODECS[str(point["codec"])], device, (C, R))
        return partial(_call, point, view, *_inputs(B, L, (C, R), device))

    return Task(in_turn([one() for _ in range(calls)]), cost(point), is_captured, calls)


def verify(point: Point) -> None:
    """Hold stored rows, read back by `mla.codec`, against the oracle's rows.

    Raises:
        GateError: something else was stored.
    """
    device = torch.device("cpu" if launch.is_interpreting() else "cuda")
    codec, sizes, L = CODECS[str(point["codec"])], (C, R), 3
    view = make_view(2, L, 0, codec, device, sizes)
    kv_a, weight, cos, sin = _inputs(2, L, sizes, device)
    _call(point, view, kv_a, weight, cos, sin)
    decoded = codec.decode(view.rows.cpu(), *sizes, torch.float64)
    latent, k_rope = decoded.split(list(sizes), dim=-1)
    if codec.rotation:
        latent = rotate_latent(latent)
    expected = kv_a.cpu().double()
    if point["form"] == "fused":
        fresh, rope = expected.split(list(sizes), dim=-1)
        fresh = reference.rms_norm(fresh, weight.cpu().double(), EPS)
        angles = torch.atan2(sin.cpu().double(), cos.cpu().double())
        expected = torch.cat([fresh, reference.rotate(rope, angles, "interleaved")], dim=-1)
    gate(
        {str(point["impl"]): torch.cat([latent, k_rope], dim=-1)},
        expected=expected,
        tolerance=TOLERANCES[codec.kind],
        point={key: point[key] for key in ("form", "codec")},
    )


def verify_key(point: Point) -> tuple[Any, ...]:
    return tuple(point[key] for key in ("impl", "form", "codec"))


def _inputs(
    B: int, L: int, sizes: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv_a, norm weight, cos and sin in bfloat16."""
    generator = torch.Generator(device).manual_seed(3)
    options: dict[str, Any] = {"generator": generator, "device": device}
    kv_a = torch.randn(B, L, sum(sizes), **options).bfloat16()
    weight = (1 + 0.1 * torch.randn(sizes[0], **options)).bfloat16()
    angles = 3 * torch.randn(B, L, sizes[1] // 2, **options)
    return kv_a, weight, angles.cos().bfloat16(), angles.sin().bfloat16()


def _call(
    point: Point, view: CacheView, kv_a: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> None:
    impl: Any = point["impl"]
    if point["form"] == "append":
        latent, k_rope = kv_a.split([view.C, view.R], dim=-1)
        mla_append(view, latent, k_rope, impl=impl)
        return
    mla_norm_rope_append(view, kv_a, weight, cos, sin, eps=EPS, pairing="interleaved", impl=impl)
