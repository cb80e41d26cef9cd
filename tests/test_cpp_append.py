"""The C++ append: bytes as `mla.codec` makes them, the fused form, what it refuses.

tests/test_append.py runs the same kernels through the op.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, make_view, poison_, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, LATENT_WIDTHS, SEEDS
from torch import Tensor

from mla import reference
from mla.checks import ShapeError
from mla.codec import Codec, Int8Codec, PlainCodec
from mla.kernels import cpu
from mla.rope import rotate
from mla.view import CacheView

F64 = torch.float64
NARROW = [torch.float32, torch.bfloat16, torch.float16]

if cpu.reason_absent():
    pytest.skip(f"C++ kernels: {cpu.reason_absent()}", allow_module_level=True)


def bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def empty_view(C: int, R: int, codec: Codec, dtype: torch.dtype, *lengths: int) -> CacheView:
    width, dtype = codec.row_width(C, R), codec.storage_dtype(dtype)
    rows = poison_(torch.empty(len(lengths), max(lengths) + 2, width, dtype=dtype))
    return CacheView.dense(rows, torch.tensor(lengths, dtype=torch.int32), C=C, R=R, codec=codec)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
@given(
    C=LATENT_WIDTHS,
    R=st.sampled_from([0, 2, 5, 10]),
    dtype=st.sampled_from(NARROW),
    stored=st.sampled_from([*NARROW, F64]),
    magnitude=st.sampled_from([1.0, 1e-6, 1e4, 1e30]),
    seed=SEEDS,
)
def test_bytes_equal_those_of_the_codec(codec, C, R, dtype, stored, magnitude, seed):
    largest = torch.finfo(dtype).max  # infinities have a test of their own
    latent = (magnitude * randn(2, 3, C, seed=seed, dtype=F64)).clamp(-largest, largest).to(dtype)
    latent[0, 0, : C // 2] = 0  # a group of zeros and one that is not
    k_rope = randn(2, 3, R, seed=seed + 1, dtype=dtype)
    view = empty_view(C, R, codec, stored, 3, 7)
    before = bits(view.rows).clone()
    cpu.append(view, latent, k_rope, None)
    expected = bits(codec.encode(latent, k_rope).to(view.rows.dtype))
    assert torch.equal(bits(view.rows[0, :3]), expected[0])
    assert torch.equal(bits(view.rows[1, 4:7]), expected[1])
    assert torch.equal(bits(view.rows[0, 3:]), before[0, 3:])
    assert torch.equal(bits(view.rows[1, :4]), before[1, :4])


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda codec: codec.spec)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_stay_visible(codec, bad):
    latent, k_rope = randn(1, 1, 130, seed=0), randn(1, 1, 4, seed=1)
    latent[0, 0, 5] = bad
    view = empty_view(130, 4, codec, torch.float32, 1)
    cpu.append(view, latent, k_rope, None)
    ours = codec.decode(view.rows[:, :1], 130, 4, torch.float32)
    theirs = codec.decode(codec.encode(latent, k_rope), 130, 4, torch.float32)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours[theirs.isfinite()], theirs[theirs.isfinite()])


@given(
    dtype=st.sampled_from(NARROW),
    angle_dtype=st.sampled_from([*NARROW, F64]),
    pairing=st.sampled_from(["none", "interleaved", "half"]),
    R=st.sampled_from([0, 2, 6]),
    has_norm=st.booleans(),
    latent_scale=st.sampled_from([1.0, 1.7]),
    codec=st.sampled_from([PlainCodec(), Int8Codec()]),
    seed=SEEDS,
)
def test_fused_form(dtype, angle_dtype, pairing, R, has_norm, latent_scale, codec, seed):
    B, L, C = 2, 3, 40
    kv_a = randn(B, L, 2 * (C + R), seed=seed, dtype=dtype)[..., : C + R]
    weight = randn(C, seed=seed + 1, dtype=dtype) if has_norm else None
    angle = randn(B, L, R // 2, seed=seed + 2, dtype=F64)
    cos, sin = angle.cos().to(angle_dtype), angle.sin().to(angle_dtype)
    view = empty_view(C, R, codec, dtype, 3, 4)
    latent, k_rope = cpu.norm_rope_append(
        view, kv_a, weight, cos, sin, 1e-6, latent_scale, pairing, None
    )

    def plain(kind: torch.dtype) -> Tensor:
        x = kv_a[..., :C].to(kind)
        if weight is not None:
            x = reference.rms_norm(x, weight.to(kind), 1e-6)
        return x * latent_scale

    assert latent.dtype == k_rope.dtype == dtype
    assert_within_budget(latent, plain(F64), plain(dtype), "latent")
    if angle_dtype == F64:
        cos, sin = cos.float(), sin.float()
    turned = rotate(kv_a[..., C:], cos, sin, pairing)
    tolerance = 2 * torch.finfo(dtype).eps
    # The turned pair is rounded once here, and once in the plain form.
    torch.testing.assert_close(k_rope, turned, rtol=tolerance, atol=tolerance)
    if dtype != torch.float32 and angle_dtype == dtype:
        assert torch.equal(k_rope, turned), "every product is rounded, as in transformers"
    again = empty_view(C, R, codec, dtype, 3, 4)
    cpu.append(again, latent, k_rope, None)
    assert torch.equal(bits(again.rows), bits(view.rows))


def test_many_tokens_on_many_threads():
    latent, k_rope = randn(3, 100, 40, seed=0), randn(3, 100, 6, seed=1)
    views = [empty_view(40, 6, Int8Codec(), torch.float32, 100, 100, 130) for _ in range(2)]
    cpu.append(views[0], latent, k_rope, None)
    torch.set_num_threads(3)
    try:
        cpu.append(views[1], latent, k_rope, None)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(bits(views[0].rows), bits(views[1].rows))


def paged(**changes: Any) -> CacheView:
    view = make_view(
        *(randn(2, 9, w, seed=w, dtype=F64) for w in (5, 2)), [9, 4], page_size=4, seed=1
    )
    return replace(view, **changes)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "new_lengths", "message"),
    [
        ({"lengths": int32(9, -1)}, None, "lengths has values up to -1"),
        ({"lengths": int32(9, 99)}, None, "lengths has values up to 99"),
        ({"lengths": int32(9, 1)}, None, "new_lengths has value 2, expected 0 to L=2 and at most"),
        ({}, int32(3, 0), "new_lengths has value 3"),
        ({}, int32(-1, 0), "new_lengths has value -1"),
        ({}, int32(1), "new_lengths has size 1"),
        ({"page_table": int32([0, 1, 99, 0], [0, 1, 1, 0])}, None, "has pages 0 to 99 in use"),
        ({"rows": torch.zeros(2, 4, 6)}, None, "rows has size 6 in dim 2, expected 7"),
    ],
)
def test_nothing_is_written_by_a_call_that_is_refused(changes, new_lengths, message):
    view = paged(**changes)
    before = bits(view.rows).clone()
    with pytest.raises(ShapeError) as error:
        cpu.append(view, torch.zeros(2, 2, 5), torch.zeros(2, 2, 2), new_lengths)
    assert message in str(error.value)
    assert torch.equal(bits(view.rows), before)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5), (2, 1, 2)), "latent has 2 dims, expected 3"),
        (((2, 1, 5), (2, 3, 2)), "k_rope has size 3 in dim 1, expected 1"),
        (((2, 1, 6), (2, 1, 2)), "rows has size 7 in dim 2, expected 8"),
        (((3, 1, 5), (3, 1, 2)), "page_table has size 2 in dim 0, expected 3"),
    ],
)
def test_rows_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ShapeError, match=message):
        cpu.append(paged(), *(torch.zeros(shape) for shape in shapes), None)


def test_fused_arguments_that_do_not_fit_are_refused():
    def fused(weight: Tensor | None = None, cos: int = 1) -> None:
        angles = [torch.zeros(2, 1, cos)] * 2
        cpu.norm_rope_append(
            paged(), torch.zeros(2, 1, 7), weight, *angles, 1e-6, 1.0, "half", None
        )

    for options, message in (
        ({"weight": torch.zeros(4)}, "norm_weight has size 4"),
        ({"weight": torch.zeros(5, dtype=torch.bfloat16)}, "norm_weight is strided or of another"),
        ({"cos": 2}, "cos has size 2 in dim 2, expected 1"),
    ):
        with pytest.raises(ShapeError, match=message):
            fused(**options)
