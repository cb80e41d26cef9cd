"""Row layouts byte by byte, error bounds of the codecs, and what they do with strange values."""

from __future__ import annotations

import math
import re
import struct

import pytest
import torch
from helpers import oracle_row, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, CODED, LATENT_WIDTHS, ROPE_WIDTHS, SEEDS
from torch import Tensor

from mla import reference
from mla.checks import UnsupportedError
from mla.codec import (
    CODECS as CODEC_NAMES,
)
from mla.codec import (
    Codec,
    Fp8Codec,
    Int4Codec,
    Int8Codec,
    codec_from_spec,
    rotate_latent,
)

F64 = torch.float64
# 1e-4 of DeepSeek's formula, the smallest normal float32, and what the rotation of a block adds up.
MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 300.0, 6e4])


def group_amax(codec: Codec, latent: Tensor) -> Tensor:
    """The largest magnitude in the group of each value, ``[T, C]``."""
    groups = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in
              latent.split(codec.group, dim=-1)]  # fmt: skip
    return torch.cat(groups, dim=-1)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
@given(C=LATENT_WIDTHS, R=ROPE_WIDTHS, magnitude=MAGNITUDES, seed=SEEDS)
def test_decode_reads_the_documented_layout(codec, C, R, magnitude, seed):
    latent, k_rope = magnitude * randn(3, C, seed=seed), randn(3, R, seed=seed + 1)
    rows = codec.encode(latent, k_rope)
    assert rows.shape == (3, codec.row_width(C, R))
    assert rows.dtype == codec.storage_dtype(torch.float32)
    expected = torch.stack([oracle_row(codec, row, C, R) for row in rows])
    actual = codec.decode(rows, C, R, F64)
    if codec.rotation:
        actual = torch.cat([rotate_latent(actual[..., :C]), actual[..., C:]], dim=-1)
    # Float64: scale times code and the rotation in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * magnitude)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(
            codec.decode(rows, C, R, dtype).double(),
            codec.decode(rows, C, R, F64).to(dtype).double(),
            rtol=torch.finfo(dtype).eps,
            # The smallest float32 that is not 0.
            atol=1e-45,
        )


@pytest.mark.parametrize("codec", CODED, ids=lambda codec: codec.spec)
@given(C=LATENT_WIDTHS, R=ROPE_WIDTHS, magnitude=MAGNITUDES, seed=SEEDS)
def test_error_of_a_value_is_at_most_half_a_step(codec, C, R, magnitude, seed):
    latent, k_rope = magnitude * randn(4, C, seed=seed), magnitude * randn(4, R, seed=seed + 1)
    decoded = codec.decode(codec.encode(latent, k_rope), C, R, F64)
    # In the space in which the values are coded.
    latent = rotate_latent(latent) if codec.rotation else latent
    error = (decoded[..., :C] - latent.double()).abs()
    amax = group_amax(codec, latent.double())
    if codec.kind == "fp8":
        scale = torch.clamp(amax / 448, min=1e-4).log2().ceil().exp2()
        # 3 bits of mantissa; below 2**-6 the step is 2**-9.
        bound = torch.maximum(latent.double().abs() * 2.0**-4, scale * 2.0**-10)
    else:
        steps = {"int8": 127, "int4": 7}[codec.kind]
        bound = amax / steps / 2
        # The stored scale is itself rounded, and the largest value with it.
        tiny = 2.0**-24 if codec.kind == "int4" else 2.0**-149
        bound = bound * 1.01 + amax * torch.finfo(codec.scale_dtype).eps + steps * tiny
    assert (error <= bound * (1 + 1e-6) + 1e-300).all()
    rope_error = (decoded[..., C:] - k_rope.double()).abs()
    if codec.rope_bits == 16:
        assert (rope_error <= k_rope.double().abs() * 2.0**-8 + 1e-40).all()
    elif R:
        rope_amax = k_rope.double().abs().amax(-1, keepdim=True)
        eps = torch.finfo(codec.scale_dtype).eps
        assert (rope_error <= rope_amax * (0.505 / 127 + eps) + 127 * 2.0**-25).all()


@pytest.mark.parametrize(
    ("codec", "sections"),
    [
        (Fp8Codec(), (4, 512, 528, 656)),
        (Int8Codec(), (4, 512, 528, 656)),
        (Int8Codec(rope_bits=8), (4, 512, 544, 608)),
        (Int4Codec(), (8, 256, 272, 400)),
        (Int4Codec(group=32), (16, 256, 288, 416)),
        (Int4Codec(rope_bits=8), (8, 256, 288, 352)),
    ],
    ids=lambda value: getattr(value, "spec", None),
)
def test_row_bytes_of_a_deepseek_layer(codec, sections):
    assert codec.sections(512, 64) == sections
    assert codec.row_width(512, 64) == sections[-1]


def test_fp8_row_is_that_of_deepseek_v3_2_byte_for_byte():
    latent, k_rope = 5 * randn(512, seed=0), randn(64, seed=1)
    latent[128:256] *= 1e-7  # below the smallest scale
    row = bytes(Fp8Codec().encode(latent, k_rope).tolist())
    assert len(row) == 656
    expected = b""
    for first in range(0, 512, 128):
        part = latent[first : first + 128]
        scale = 2.0 ** math.ceil(math.log2(max(part.abs().max().item() / 448, 1e-4)))
        assert struct.unpack_from("<f", row, 512 + first // 32) == (scale,)
        expected += bytes((part / scale).to(torch.float8_e4m3fn).view(torch.uint8).tolist())
    assert row[:512] == expected
    assert row[528:] == bytes(k_rope.bfloat16().view(torch.uint8).tolist())


def test_int4_nibbles_even_values_low():
    latent = torch.tensor([7.0, -7.0, 3.0, 0.0, 1.0]).repeat(1, 1)
    row = Int4Codec(rotation=False).encode(latent, latent[:, :2])[0].tolist()
    assert row[:3] == [15 | 1 << 4, 11 | 8 << 4, 9]  # the odd one out is padded with 0
    assert struct.unpack_from("<e", bytes(row), 16) == (1.0,)


@pytest.mark.parametrize("codec", CODED, ids=lambda codec: codec.spec)
def test_zero_groups_stay_zero(codec):
    latent = torch.zeros(2, 130)
    latent[0, :32] = 3.0
    decoded = codec.decode(codec.encode(latent, torch.zeros(2, 6)), 130, 6, torch.float32)
    assert decoded.isfinite().all()
    assert (decoded[1] == 0).all() and (decoded[0, 130:] == 0).all()
    if not codec.rotation and codec.group <= 32:
        assert (decoded[0, 32:] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", CODED, ids=lambda codec: codec.spec)
def test_nan_and_infinity_leave_nothing_that_looks_like_a_number(codec, bad):
    latent, k_rope = randn(2, 130, seed=0), randn(2, 6, seed=1)
    latent[0, 40] = bad
    k_rope[1, 3] = bad
    decoded = codec.decode(codec.encode(latent, k_rope), 130, 6, torch.float32)
    group = torch.arange(130) // codec.group == 40 // codec.group
    assert not decoded[0, :130][group].isfinite().any()
    assert not decoded[1, 133].isfinite()
    if not codec.rotation:  # the others are untouched
        assert decoded[0, :130][~group].isfinite().all() and decoded[1, :130].isfinite().all()


def test_finite_values_beyond_the_largest_scale_saturate():
    latent = torch.tensor([[1e6, -1e6, 458_528.0, 0.0]])
    decoded = Int4Codec(rotation=False).decode(
        Int4Codec(rotation=False).encode(latent, latent[:, :0]), 4, 0, torch.float32
    )
    assert decoded.tolist() == [[458_528.0, -458_528.0, 458_528.0, 0.0]]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_a_row_depends_on_nothing_but_itself(codec):
    latent, k_rope = randn(2, 3, 130, seed=0), randn(2, 3, 6, seed=1)
    rows = codec.encode(latent, k_rope)
    alone = codec.encode(latent[1, 2], k_rope[1, 2])
    # Bytes: no tolerance.
    torch.testing.assert_close(rows[1, 2], alone, rtol=0, atol=0)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_padding_bytes_are_zero_and_slices_decode(codec):
    rows = codec.encode(randn(4, 3, 7, seed=0), randn(4, 3, 2, seed=1))
    whole = codec.decode(rows, 7, 2, torch.float32)
    assert torch.equal(codec.decode(rows[1:3, ::2], 7, 2, torch.float32), whole[1:3, ::2])
    if codec.kind != "plain":
        at = codec.sections(7, 2)
        used = at.rope_at + 2 * codec.rope_bits // 8
        assert (rows[..., used:] == 0).all() and at.row_bytes % 16 == 0


@given(C=st.sampled_from([1, 5, 6, 24, 96, 128, 130, 512]), seed=SEEDS)
def test_rotation_is_orthonormal_and_its_own_inverse(C, seed):
    x, y = randn(3, C, seed=seed, dtype=F64), randn(3, C, seed=seed + 1, dtype=F64)
    torch.testing.assert_close(rotate_latent(rotate_latent(x)), x)
    torch.testing.assert_close((rotate_latent(x) * rotate_latent(y)).sum(-1), (x * y).sum(-1))


@pytest.mark.parametrize(("C", "size"), [(5, 1), (6, 2), (24, 8), (96, 32), (128, 128), (512, 128)])
def test_rotation_is_a_block_hadamard(C, size):
    matrix = rotate_latent(torch.eye(C, dtype=F64))
    expected = torch.block_diag(*[reference.hadamard(size)] * (C // size))
    # 1/sqrt(size) by two routines.
    torch.testing.assert_close(matrix, expected, rtol=1e-15, atol=0)


def test_rotation_spreads_an_outlier():
    """The reason for it: one large value no longer costs the others their 4 bits."""
    latent = randn(8, 128, seed=0)
    latent[:, 17] = 60.0

    def error(codec: Codec) -> Tensor:
        rows = codec.decode(codec.encode(latent, latent[:, :0]), 128, 0, torch.float32)
        rows = rotate_latent(rows) if codec.rotation else rows
        return (rows - latent)[:, :17].square().mean()

    assert error(Int4Codec(group=128)) < 0.6 * error(Int4Codec(group=128, rotation=False))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_spec_round_trip(codec):
    assert codec_from_spec(codec.spec) == codec
    assert type(codec_from_spec(codec.spec)) is type(codec)


def test_codecs_of_different_kinds_differ():
    assert len(set(CODECS)) == len(CODECS) and Fp8Codec() != Int8Codec()
    assert CODEC_NAMES == ("plain", "fp8", "int8", "int4")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Int8Codec(group=48),
            "Int8Codec: group has value 48, expected a power of two of at least 16",
        ),
        (lambda: Int4Codec(group=8), "Int4Codec: group has value 8, expected a power of two"),
        (lambda: Int4Codec(rope_bits=4), "Int4Codec: rope_bits has value 4, expected 8 or 16"),
        (lambda: Fp8Codec(rope_bits=8), "Fp8Codec: rope_bits has value 8, expected 16"),
        (lambda: codec_from_spec("int3"), "codec_from_spec: spec has value 'int3', expected one"),
        (lambda: codec_from_spec("int8/64"), "codec_from_spec: spec has value 'int8/64'"),
    ],
)
def test_options_that_do_not_exist(make, message):
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        make()
