"""The published objective on one layer, against plain grouped-query attention in float64."""

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from test_convert import LAYERS, Case, layer_of
from torch import Tensor

from mla.checks import ShapeError
from mla.convert.published import published_layer

FOLDS = st.sampled_from([1, 2, 4])


def case_of(values: dict, *, half_d: int | None = None) -> Case:
    return Case(**(values if half_d is None else values | {"half_d": half_d}))


def convert(case: Case, **options):
    return published_layer(
        case.weights,
        case.moments,
        num_heads=case.H,
        num_kv_heads=case.G,
        head_dim=case.d,
        inv_freq=case.inv_freq,
        **options,
    )


def output(converted, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer_of(converted)(x[None])[0]


@given(values=LAYERS)
def test_full_budget_is_exact(values):
    case = case_of(values)
    converted = convert(case, kv_budget=1.0)
    assert converted.config.cache_width == converted.report.cached_numbers == 2 * case.G * case.d
    torch.testing.assert_close(
        output(converted, case.x), case.attention(case.x), rtol=1e-9, atol=1e-9
    )
    assert converted.report.output_error < 1e-6


@given(values=LAYERS, fold=FOLDS)
def test_folding_frequencies_that_are_equal_is_exact(values, fold):
    case = case_of(values, half_d=4)
    case.inv_freq = case.inv_freq[::fold].repeat_interleave(fold)
    converted = convert(case, kv_budget=1.0, fold=fold)
    torch.testing.assert_close(
        output(converted, case.x), case.attention(case.x), rtol=1e-9, atol=1e-9
    )


@given(values=LAYERS, fold=FOLDS)
def test_what_does_not_turn_needs_no_rotation(values, fold):
    case = case_of(values, half_d=4)
    case.inv_freq = torch.zeros_like(case.inv_freq)
    converted = convert(case, kv_budget=(case.d // fold, 2 * case.G * case.d), fold=fold)
    torch.testing.assert_close(
        output(converted, case.x), case.attention(case.x), rtol=1e-7, atol=1e-7
    )


@given(values=LAYERS, gains=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_one_rope_key_does_for_key_heads_that_are_multiples_of_each_other(values, gains):
    case = case_of(values)
    one = case.project("key", torch.eye(case.D, dtype=torch.float64))[0].T  # biases included
    bias = None if case.weights.key_bias is None else case.weights.key_bias[: case.d]
    one = one if bias is None else one - bias[:, None]
    scales = [1.0, *gains][: case.G]
    case.weights = case.weights._replace(
        key=torch.cat([scale * one for scale in scales]),
        key_bias=None if bias is None else torch.cat([scale * bias for scale in scales]),
    )
    converted = convert(case, kv_budget=(case.d, case.G * case.d))
    torch.testing.assert_close(
        output(converted, case.x), case.attention(case.x), rtol=1e-6, atol=1e-6
    )


@given(values=LAYERS, rank=st.integers(1, 3))
def test_a_latent_as_wide_as_the_inputs_spread_is_exact(values, rank):
    case = Case(**values, rank=rank)  # and one for the mean, which is not taken out
    converted = convert(case, kv_budget=(case.G * case.d, min(rank + 1, case.G * case.d)))
    torch.testing.assert_close(
        output(converted, case.x), case.attention(case.x), rtol=1e-5, atol=1e-5
    )


@given(values=LAYERS, fold=FOLDS, keys=st.integers(1, 4))
def test_the_rope_key_takes_as_many_components_of_every_group(values, fold, keys):
    case = case_of(values, half_d=4)
    R = min(keys * case.d // fold, case.G * case.d)
    found = torch.tensor(convert(case, kv_budget=(R, 1), fold=fold).report.rotated_frequencies)
    assert len(set(torch.bincount(found // fold, minlength=4 // fold).tolist())) == 1
    if R % case.d == 0:
        assert torch.equal(found.bincount(), torch.full((4,), R // case.d))


@given(values=LAYERS)
def test_reported_value_error_is_the_measured_one(values):
    case = case_of(values)
    converted = convert(case, kv_budget=(case.G * case.d, 1))
    with torch.no_grad():
        layer = layer_of(converted)
        latent, _ = layer.latents(case.x[None], torch.zeros(1, len(case.x), dtype=torch.long))
        actual = layer.kv_b_proj(latent)[0].unflatten(-1, (case.H, -1))[..., -case.d :]
    exact = case.project("value", case.x).repeat_interleave(case.H // case.G, 0).transpose(0, 1)
    measured = float((actual - exact).norm() / exact.norm())
    assert converted.report.value_error == pytest.approx(measured, rel=1e-6, abs=1e-6)


@given(values=LAYERS, widths=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_wider_latent_loses_no_more(values, widths):
    case = case_of(values)
    small, large = (
        convert(case, kv_budget=(case.d, width)).report.output_error for width in sorted(widths)
    )
    assert large <= small + 1e-6


@given(values=LAYERS, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_size_of_the_keys_does_not_matter(values, scale):
    """Keys and values are balanced: a layer with larger keys and smaller queries is the same."""
    case = case_of(values)
    same = (
        {}
        if case.weights.key_bias is None
        else {
            "key_bias": scale * case.weights.key_bias,
            "query_bias": case.weights.query_bias / scale,
        }
    )
    expected = output(convert(case, kv_budget=(case.d, 2)), case.x)
    case.weights = case.weights._replace(
        key=scale * case.weights.key, query=case.weights.query / scale, **same
    )
    found = output(convert(case, kv_budget=(case.d, 2)), case.x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dtype_of_the_weights_and_the_output_bias_are_kept():
    case = Case(G=2, per_group=2, half_d=4, D=16, has_biases=True, seed=3)
    case.weights = type(case.weights)(*(x if x is None else x.bfloat16() for x in case.weights))
    bias = randn(16, seed=1, dtype=torch.bfloat16)
    before = [x if x is None else x.clone() for x in case.weights]
    case.weights = case.weights._replace(output_bias=bias)
    converted = convert(case, kv_budget=0.75, fold=2)
    assert {x.dtype for x in converted.state_dict.values()} == {torch.bfloat16}
    assert torch.equal(converted.state_dict["o_proj.bias"], bias)
    for held, given_ in zip(before[:-1], case.weights, strict=False):
        assert held is given_ is None or torch.equal(held, given_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 3}, "fold has value 3, expected a divisor of 4"),
        ({"fold": 0}, "fold has value 0, expected a divisor of 4"),
        ({"kv_budget": 0.25}, "R = 8 and C = 0, expected a multiple of 8 up to 16"),
        ({"kv_budget": (6, 4)}, "R = 6 and C = 4, expected a multiple of 8 up to 16"),
        ({"kv_budget": (2, 4), "fold": 2}, "expected a multiple of 4 up to 16"),
        ({"kv_budget": (24, 4)}, "expected a multiple of 8 up to 16"),
        ({"kv_budget": (8, 0)}, "R = 8 and C = 0"),
        ({"inv_freq": torch.ones(3)}, r"inv_freq has shape \(3,\), expected \[4\]"),
    ],
)
def test_bad_arguments(options, message):
    case = Case(G=2, per_group=2, half_d=4, D=16, has_biases=False, seed=3)
    case.inv_freq = options.pop("inv_freq", case.inv_freq)
    with pytest.raises(ShapeError, match=message):
        convert(case, **options)
