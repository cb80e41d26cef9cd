"""One layer through `gqa_to_mla`, against plain grouped-query attention in float64."""

import math

import pytest
import torch
from helpers import generator, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mla.checks import ShapeError
from mla.convert import AttentionWeights, InputMoments, gqa_to_mla
from mla.module import MultiheadLatentAttention

LAYERS = st.fixed_dictionaries(
    {
        "G": st.integers(1, 3),
        "per_group": st.integers(1, 3),
        "half_d": st.integers(1, 5),
        "D": st.sampled_from([7, 16, 40]),
        "has_biases": st.booleans(),
        "seed": st.integers(0, 2**31 - 1),
    }
)


class Case:
    """A random layer, inputs that lie around a mean, and their moments."""

    def __init__(
        self,
        G: int,
        per_group: int,
        half_d: int,
        D: int,
        has_biases: bool,
        seed: int,
        rank: int = 0,
    ) -> None:
        rng = generator(seed)
        self.G, self.H, self.d, self.D = G, G * per_group, 2 * half_d, D

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        rows = {"query": self.H * self.d, "key": G * self.d, "value": G * self.d}
        tensors = {name: draw(count, D) / D**0.5 for name, count in rows.items()}
        tensors["output"] = draw(D, self.H * self.d)
        if has_biases:
            tensors |= {f"{name}_bias": draw(count) for name, count in rows.items()}
        self.weights = AttentionWeights(**tensors)
        self.inv_freq = torch.rand(half_d, generator=rng, dtype=torch.float64)
        spread = draw(rank or D, D) * torch.rand(rank or D, 1, generator=rng, dtype=torch.float64)
        self.x = draw(1, D) + draw(50, rank or D) @ spread
        second_moment = self.x.T @ self.x / len(self.x)
        self.moments = InputMoments.from_second_moment(second_moment, self.x.mean(0))

    def convert(self, **options):
        options = {"inv_freq": self.inv_freq} | options
        return gqa_to_mla(
            self.weights,
            self.moments,
            num_heads=self.H,
            num_kv_heads=self.G,
            head_dim=self.d,
            **options,
        )

    def project(self, name: str, x: Tensor) -> Tensor:
        """``[heads, T, d]``."""
        bias = getattr(self.weights, f"{name}_bias")
        rows = x @ getattr(self.weights, name).T + (0.0 if bias is None else bias)
        return rows.unflatten(-1, (-1, self.d)).transpose(0, 1)

    def scores(self, x_q: Tensor, x_k: Tensor, distance: int) -> Tensor:
        """``[H, queries, keys]``, unscaled, as if all pairs were that far apart."""
        query, key = self.project("query", x_q), self.project("key", x_k)
        query = rotate_half_split(query, self.inv_freq * distance)
        return query @ key.repeat_interleave(self.H // self.G, 0).mT

    def turning_scores(self) -> Tensor:
        """Squared scores ``[H, queries, keys]``, the mean over all phases of every pair."""
        query, key = (
            self.project(name, self.x).unflatten(-1, (2, -1)).square().sum(-2)
            for name in ("query", "key")
        )
        return 0.5 * query @ key.repeat_interleave(self.H // self.G, 0).mT

    def attention(self, x: Tensor) -> Tensor:
        """The layer's output ``[T, D]``, causal."""
        T = len(x)
        angles = torch.arange(T, dtype=torch.float64)[:, None] * self.inv_freq
        query = rotate_half_split(self.project("query", x), angles)
        key = rotate_half_split(self.project("key", x), angles)
        key, value = (
            rows.repeat_interleave(self.H // self.G, 0) for rows in (key, self.project("value", x))
        )
        scores = query @ key.mT / math.sqrt(self.d)
        scores.masked_fill_(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1) @ self.weights.output.T


def rotate_half_split(rows: Tensor, angles: Tensor) -> Tensor:
    low, high = rows.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def layer_of(converted) -> MultiheadLatentAttention:
    layer = MultiheadLatentAttention(converted.config, dtype=torch.float64)
    layer.load_state_dict(converted.state_dict, strict=True)
    return layer


def converted_scores(converted, x_q: Tensor, x_k: Tensor) -> Tensor:
    """``[H, queries, keys]`` at distance 0, unscaled."""
    layer, config = layer_of(converted), converted.config
    zeros_q, zeros_k = (torch.zeros(1, len(x), dtype=torch.long) for x in (x_q, x_k))
    query = layer.queries(x_q[None], zeros_q)[0]
    latent, k_rope = (part[0] for part in layer.latents(x_k[None], zeros_k))
    up = layer.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
    k_nope = up[..., : config.qk_nope_head_dim].transpose(0, 1)
    key = torch.cat([k_nope, k_rope.expand(len(k_nope), -1, -1)], -1)
    return query.transpose(0, 1) @ key.mT


def centered(scores: Tensor) -> Tensor:
    """Without what softmax cannot see: a number added to all scores of a query."""
    return scores - scores.mean(-1, keepdim=True)


@given(case=LAYERS)
def test_full_budget_is_exact(case):
    case = Case(**case)
    converted = case.convert(kv_budget=1.0)
    assert converted.config.cache_width == converted.report.cached_numbers == 2 * case.G * case.d
    with torch.no_grad():
        out = layer_of(converted)(case.x[None])[0]
    torch.testing.assert_close(out, case.attention(case.x), rtol=1e-9, atol=1e-9)
    assert converted.report.output_error < 1e-6


@given(case=LAYERS)
def test_what_does_not_turn_needs_no_rotation(case):
    case = Case(**case)
    case.inv_freq = torch.zeros_like(case.inv_freq)
    converted = case.convert(kv_budget=(0, 2 * case.G * case.d))
    with torch.no_grad():
        out = layer_of(converted)(case.x[None])[0]
    torch.testing.assert_close(out, case.attention(case.x), rtol=1e-7, atol=1e-7)


@given(case=LAYERS)
def test_unrotated_scores_are_the_mean_over_distances(case):
    case = Case(**case)
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    case.moments = case.moments._replace(distances=7 * weights)
    converted = case.convert(kv_budget=(0, 2 * case.G * case.d))
    mean = sum(
        share * case.scores(case.x, case.x, distance)
        for distance, share in enumerate(weights / weights.sum())
    )
    with torch.no_grad():
        actual = converted_scores(converted, case.x, case.x)
    torch.testing.assert_close(centered(actual), centered(mean), rtol=1e-7, atol=1e-7)


@given(case=LAYERS, rank=st.integers(1, 3))
def test_a_latent_as_wide_as_the_inputs_spread_is_exact(case, rank):
    case = Case(**case, rank=rank)
    converted = case.convert(kv_budget=(case.G * case.d, min(rank, case.G * case.d)))
    with torch.no_grad():
        out = layer_of(converted)(case.x[None])[0]
    torch.testing.assert_close(out, case.attention(case.x), rtol=1e-5, atol=1e-5)


@given(case=LAYERS)
def test_reported_score_error_is_the_measured_one(case):
    case = Case(**case)
    case.inv_freq = torch.zeros_like(case.inv_freq)  # nothing is lost by not turning
    converted = case.convert(kv_budget=(0, case.d))
    exact = case.scores(case.x, case.x, 0)
    with torch.no_grad():
        error = centered(converted_scores(converted, case.x, case.x)) - centered(exact)
    value = case.project("value", case.x)
    spread = (value - value.mean(1, keepdim=True)).repeat_interleave(case.H // case.G, 0)
    seen = torch.einsum("htd,ohd->hto", spread, case.weights.output.unflatten(1, (case.H, -1)))
    gain = seen.square().sum((1, 2))[:, None, None]
    measured = ((gain * error.square()).sum() / (gain * case.turning_scores()).sum()).sqrt()
    assert converted.report.score_error == pytest.approx(float(measured), rel=1e-6, abs=1e-6)


@given(case=LAYERS)
def test_reported_value_error_is_the_measured_one(case):
    case = Case(**{**case, "per_group": 1, "G": 1})  # one head: no question of heads together
    converted = case.convert(kv_budget=(case.d, 1))
    with torch.no_grad():
        layer = layer_of(converted)
        latent, _ = layer.latents(case.x[None], torch.zeros(1, len(case.x), dtype=torch.long))
        actual = layer.o_proj(layer.kv_b_proj(latent)[0, :, -case.d :])
    exact = case.project("value", case.x)[0] @ case.weights.output.T
    spread = exact - exact.mean(0)
    measured = float((actual - exact).norm() / spread.norm())
    assert converted.report.value_error == pytest.approx(measured, rel=1e-6, abs=1e-6)


@given(case=LAYERS, shares=st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0)))
def test_a_larger_budget_costs_no_more(case, shares):
    case = Case(**{**case, "half_d": 4})
    small, large = sorted(shares)
    errors = [case.convert(kv_budget=share).report.output_error for share in (small, large)]
    assert errors[1] <= errors[0] * (1 + 1e-9) + 1e-6


@given(case=LAYERS)
def test_fast_pairs_keep_their_rotation(case):
    case = Case(**{**case, "half_d": 4, "G": 1, "has_biases": False})
    case.inv_freq = torch.tensor([1e-6, 1.0, 2e-6, 3e-6], dtype=torch.float64)
    assert case.convert(kv_budget=(2, 4)).report.rotated_frequencies == (1,)


def test_mean_of_values_goes_to_the_output_bias():
    case = Case(G=2, per_group=2, half_d=3, D=16, has_biases=True, seed=3)
    bias = randn(16, seed=1, dtype=torch.float64)
    case.weights = case.weights._replace(output_bias=bias)
    same = case.x[:1].expand(4, -1)
    case.moments = InputMoments.from_second_moment(same.T @ same / 4, same.mean(0))
    converted = case.convert(kv_budget=(2, 1))
    with torch.no_grad():
        out = layer_of(converted)(same[None])[0]
    torch.testing.assert_close(out, case.attention(same) + bias, rtol=1e-9, atol=1e-9)


def test_dtype_of_the_weights_is_kept_and_inputs_are_not_written():
    case = Case(G=2, per_group=2, half_d=3, D=16, has_biases=True, seed=3)
    case.weights = AttentionWeights(*(x if x is None else x.bfloat16() for x in case.weights))
    before = [x if x is None else x.clone() for x in case.weights]
    converted = case.convert(kv_budget=0.5)
    assert {x.dtype for x in converted.state_dict.values()} == {torch.bfloat16}
    for held, given_ in zip(before, case.weights, strict=True):
        assert held is given_ is None or torch.equal(held, given_)


def bad(case: Case, **changes):
    """``case`` with other weights."""
    case.weights = case.weights._replace(**changes)
    return case


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"kv_budget": 0.0}, ValueError, "kv_budget has value 0.0, expected 0 < share <= 1"),
        ({}, {"kv_budget": 0.01}, ValueError, "kv_budget has value 0.01, expected room"),
        (
            {},
            {"kv_budget": (3, 4)},
            ShapeError,
            r"kv_budget has value \(3, 4\), expected an even R",
        ),
        ({}, {"kv_budget": (14, 4)}, ShapeError, "of at most 12 = num_kv_heads"),
        ({}, {"kv_budget": (2, 0)}, ShapeError, "a C of at least 1"),
        ({}, {"inv_freq": torch.ones(4)}, ShapeError, r"inv_freq has shape \(4,\), expected \[3\]"),
        ({"key": torch.ones(5, 16)}, {}, ShapeError, r"key has shape \(5, 16\), expected \[12, D"),
        (
            {"key_bias": torch.ones(5)},
            {},
            ShapeError,
            r"key_bias has shape \(5,\), expected \[12\]",
        ),
        ({"value": torch.full((12, 16), torch.nan)}, {}, ValueError, "value has non-finite values"),
    ],
)
def test_bad_arguments(change, options, error, message):
    case = Case(G=2, per_group=2, half_d=3, D=16, has_biases=False, seed=3)
    with pytest.raises(error, match=message):
        bad(case, **change).convert(**options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 2, 4), "num_heads has value 3, expected a multiple of 2"),
        ((2, 2, 3), "head_dim has value 3, expected an even number"),
        ((0, 2, 4), "num_heads has value 0, expected at least 1"),
    ],
)
def test_bad_sizes(sizes, message):
    case = Case(G=2, per_group=2, half_d=3, D=16, has_biases=False, seed=3)
    case.H, case.G, case.d = sizes
    with pytest.raises(ValueError, match=message):
        case.convert()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("queries", torch.eye(16), r"queries has shape \(16, 16\), expected \[17, 17\]"),
        ("keys", torch.full((17, 17), torch.nan), "keys has non-finite values"),
        ("keys", 2 * torch.eye(17), "last entry 2.0, expected the second moment"),
        ("distances", torch.zeros(4), "distances has shape .4,. and sum 0.0"),
    ],
)
def test_bad_moments(field, value, message):
    case = Case(G=2, per_group=2, half_d=3, D=16, has_biases=False, seed=3)
    case.moments = case.moments._replace(**{field: value})
    with pytest.raises(ValueError, match=message):
        case.convert()
