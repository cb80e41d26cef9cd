"""Tiles of coded rows: every code, in every column of a word, is the number of the codec."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from mla.codec import Fp8Codec, Int4Codec, Int8Codec
from mla.kernels import launch
from mla.kernels.tiles import load_tile

CODECS = (Fp8Codec(), Int8Codec(), Int4Codec(rotation=False), Int4Codec(group=16, rotation=False))


@triton.jit
def _read_kernel(
    rows_ptr,  # [S, *] bytes
    out_ptr,  # [S, T*W] float32
    stride,
    C: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    KIND: tl.constexpr,
    SCALES_AT: tl.constexpr,
    SCALE_BITS: tl.constexpr,
):
    s = tl.arange(0, S)
    for t in tl.static_range(T):
        tile = load_tile(
            rows_ptr + s * stride, s >= 0, t, C, W, KIND, SCALES_AT, SCALE_BITS, 1, tl.float32
        )
        place = s[:, None] * (T * W) + t * W + tl.arange(0, W)[None, :]
        tl.store(out_ptr + place, tile)


@settings(max_examples=4)
@given(C=st.sampled_from([256, 130, 7]), seed=st.integers(0, 2**31 - 1))
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_every_code_in_every_column(codec, C: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    S, R, W = 16, 2, codec.group
    fresh = torch.randn(S, C, generator=rng) * torch.logspace(-4, 4, S)[:, None]
    rows = codec.encode(fresh, torch.zeros(S, R))
    at = codec.sections(C, R)
    codes = torch.randperm(256, generator=rng).repeat(-(-S * at.scales_at // 256))
    rows[:, : at.scales_at] = codes[: S * at.scales_at].view(S, -1).to(torch.uint8)  # padding too
    T = -(-C // W)
    found = torch.empty(S, T * W, device=DEVICE)
    constants = launch.row_constants(codec, C, R)
    kept = {name: constants[name] for name in ("KIND", "SCALES_AT", "SCALE_BITS")}
    _read_kernel[(1,)](rows.to(DEVICE), found, rows.stride(0), C=C, W=W, T=T, S=S, **kept)
    expected = codec.decode(rows, C, R, torch.float32)[:, :C]
    is_number = expected.isfinite()  # fp8 has two codes that are none, which nothing stores
    assert torch.equal(found.cpu()[:, :C][is_number], expected[is_number])
    assert found.isfinite().all(), "padding is multiplied by zeros, so it must not be NaN"
    assert is_number.float().mean() > 0.95
