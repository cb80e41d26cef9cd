"""What only a GPU can show: captured graphs, compiled calls, and the tiles of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE, on_device
from helpers import make_view, randn
from strategies import DecodeCase
from test_triton_decode import check
from torch import Tensor

pytest.importorskip("triton")

from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.ops import mla_append, mla_decode, supported_impls
from mla.ops.library import flatten_view
from mla.view import CacheView

pytestmark = pytest.mark.cuda

C, R, H = 64, 16, 5
CODECS = [PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec()]
BF16 = torch.bfloat16
IMPL: Any = "triton"


def kind(codec: Codec) -> str:
    return codec.kind


def full_view(codec: Codec) -> CacheView:
    """Two rows of 150 and 90 tokens on pages of 16, in bfloat16."""
    rows = [randn(2, 150, width, seed=width, dtype=torch.float64) for width in (C, R)]
    return on_device(make_view(*rows, [150, 90], codec=codec, dtype=BF16, page_size=16))


def step(view: CacheView, seed: int) -> list[Tensor]:
    """New rows and queries of one token."""
    shapes = ((2, 1, C), (2, 1, R), (2, 1, H, C), (2, 1, H, R))
    return on_device([randn(*shape, seed=seed + i, dtype=BF16) for i, shape in enumerate(shapes)])


def append_and_decode(
    latent: Tensor, k_rope: Tensor, q_latent: Tensor, q_rope: Tensor, view: CacheView
) -> tuple[Tensor, Tensor]:
    mla_append(view, latent, k_rope, impl=IMPL)
    out, lse = mla_decode(q_latent, q_rope, view, scale=0.1, impl=IMPL)
    return out, lse


@pytest.mark.parametrize("codec", CODECS, ids=kind)
def test_a_captured_step_follows_lengths_pages_and_inputs(codec: Codec) -> None:
    view, inputs = full_view(codec), step(full_view(codec), seed=0)
    append_and_decode(*inputs, view)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = append_and_decode(*inputs, view)

    for old, new in zip(inputs, step(view, seed=50), strict=True):
        old.copy_(new)
    view.lengths.copy_(torch.tensor([33, 120], dtype=torch.int32))
    assert view.page_table is not None
    view.page_table.copy_(view.page_table.flip(0))
    graph.replay()
    expected = append_and_decode(*inputs, view)
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("codec", CODECS, ids=kind)
def test_compiled_without_a_break_it_gives_the_same_bits(codec: Codec) -> None:
    torch._dynamo.reset()
    inputs = step(full_view(codec), seed=0)
    expected = append_and_decode(*inputs, full_view(codec))
    compiled = torch.compile(append_and_decode, fullgraph=True)
    for actual, wanted in zip(compiled(*inputs, full_view(codec)), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("codec", CODECS, ids=kind)
def test_opcheck(codec: Codec) -> None:
    view = full_view(codec)
    latent, k_rope, *queries = step(view, seed=0)
    ops, opcheck = torch.ops.mla, torch.library.opcheck
    opcheck(ops.decode.default, (*queries, *flatten_view(view), 0.1, None, None, IMPL))
    opcheck(ops.append.default, (*flatten_view(view), latent, k_rope, None, IMPL))


def test_auto_takes_these_kernels() -> None:
    for op in ("mla_decode", "mla_append", "merge_partials"):
        assert supported_impls(op, device=DEVICE, dtype=BF16)[0] == ("triton", None)


@pytest.mark.parametrize("codec", CODECS, ids=kind)
@pytest.mark.parametrize("heads", [16, 20, 128])
@pytest.mark.parametrize("page_size", [None, 64])
def test_tiles_of_real_models_match_the_oracle(codec, heads, page_size) -> None:
    """512 + 64 numbers a row: the tiles that the table chooses, several splits, two queries."""
    lengths, starts = (1300, 17, 0), (3, 0, 0)
    check(
        DecodeCase(2, heads, 512, 64, lengths, starts, None, page_size, codec, BF16, (1.0, 1.0), 1)
    )
