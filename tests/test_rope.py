"""Rotary embedding: an independent formula in float64, properties, compilers."""

import math

import pytest
import torch
from helpers import assert_within_budget, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mla import reference
from mla.checks import ShapeError
from mla.config import RopeConfig
from mla.rope import cos_sin, inverse_frequencies, query_position_scale, rotate

PAIRINGS = ["interleaved", "half"]
SEEDS = st.integers(0, 2**31 - 1)
EVEN = st.integers(1, 20).map(lambda n: 2 * n)
POSITIONS = st.lists(st.integers(0, 10_000), min_size=1, max_size=20)

SHORT = tuple(1.0 + 0.1 * i for i in range(8))
LONG = tuple(1.5 + 0.7 * i for i in range(8))
# The formulas, written again: plain Python numbers, one pair at a time.


def frequency(rope: RopeConfig, R: int, pair: int, is_long: bool) -> float:
    base = rope.theta ** (-2 * pair / R)
    trained = rope.original_max_position_embeddings or 0
    if rope.inv_freq is not None:
        return rope.inv_freq[pair]
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "longrope":
        assert rope.long_factor and rope.short_factor
        return base / (rope.long_factor if is_long else rope.short_factor)[pair]
    if rope.scaling == "llama3":
        assert rope.low_freq_factor and rope.high_freq_factor
        turns = trained * base / (2 * math.pi)
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        share = min(max(share, 0.0), 1.0)
        return share * base + (1 - share) * base / rope.factor
    if rope.scaling == "yarn":
        ends = []
        for turns, round_ in ((rope.beta_fast, math.floor), (rope.beta_slow, math.ceil)):
            # the pair of a wave that makes so many turns over the trained context
            end = R / 2 * math.log(trained / (2 * math.pi * turns), rope.theta)
            ends.append(round_(end) if rope.truncate else end)
        low, high = max(ends[0], 0), min(ends[1], R - 1)
        share = (pair - low) / (high - low) if high != low else float(pair > low)
        share = min(max(share, 0.0), 1.0)
        return (1 - share) * base + share * base / rope.factor
    return base


def amplitude(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    stretch = math.log(max(rope.factor, 1.0))
    if rope.scaling == "yarn" and rope.mscale and rope.mscale_all_dim:
        return (1 + 0.1 * rope.mscale * stretch) / (1 + 0.1 * rope.mscale_all_dim * stretch)
    if rope.scaling == "yarn":
        return 1 + 0.1 * stretch
    if rope.scaling == "longrope" and rope.factor > 1:
        assert rope.original_max_position_embeddings
        return math.sqrt(1 + stretch / math.log(rope.original_max_position_embeddings))
    return 1.0


ROPES = st.builds(
    RopeConfig,
    theta=st.floats(10.0, 1e7),
    scaling=st.sampled_from(["none", "linear", "llama3", "yarn", "longrope"]),
    factor=st.floats(1.0, 64.0),
    original_max_position_embeddings=st.integers(64, 10_000),
    beta_fast=st.floats(2.0, 40.0),
    beta_slow=st.floats(0.5, 1.9),
    truncate=st.booleans(),
    mscale=st.none() | st.floats(0.1, 2),
    mscale_all_dim=st.none() | st.floats(0.1, 2),
    attention_factor=st.none() | st.floats(0.5, 2),
    low_freq_factor=st.floats(0.5, 1.5),
    high_freq_factor=st.floats(2.0, 8.0),
    short_factor=st.just(SHORT),
    long_factor=st.just(LONG),
)


@given(rope=ROPES, positions=POSITIONS)
def test_float64_angles_are_those_of_an_independent_formula(rope, positions):
    trained = rope.original_max_position_embeddings
    is_long = max(positions) >= trained
    cos, sin = cos_sin(rope, 16, torch.tensor(positions), dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float64
    assert cos.shape == sin.shape == (len(positions), 8)
    angles = torch.tensor(
        [[p * frequency(rope, 16, pair, is_long) for pair in range(8)] for p in positions],
        dtype=torch.float64,
    )
    # 10,000 turns of at most 1 with a few roundings of 1e-16 each; the ramp of YaRN adds some.
    torch.testing.assert_close(cos, angles.cos() * amplitude(rope), rtol=0, atol=2e-10)
    torch.testing.assert_close(sin, angles.sin() * amplitude(rope), rtol=0, atol=2e-10)


@given(R=EVEN, seed=SEEDS)
def test_given_frequencies_are_used_as_they_are(R, seed):
    given_frequencies = randn(R // 2, seed=seed, dtype=torch.float64).abs()
    given_frequencies[0] = given_frequencies[-1]  # repeats are allowed
    rope = RopeConfig(inv_freq=tuple(given_frequencies.tolist()), theta=3.0)
    assert torch.equal(inverse_frequencies(rope, R, dtype=torch.float64), given_frequencies)
    assert torch.equal(inverse_frequencies(rope, R), given_frequencies.float())


def test_longrope_takes_the_long_frequencies_from_the_trained_context_on():
    rope = RopeConfig(
        scaling="longrope",
        original_max_position_embeddings=100,
        short_factor=SHORT,
        long_factor=LONG,
    )
    one = torch.tensor([1])
    short, _ = cos_sin(rope, 16, torch.tensor([1, 99]))
    long, _ = cos_sin(rope, 16, torch.tensor([1, 100]))
    assert torch.equal(short[:1], (one[:, None] * inverse_frequencies(rope, 16)).cos())
    assert torch.equal(long[:1], (one[:, None] * inverse_frequencies(rope, 16, long=True)).cos())
    assert not torch.equal(short[:1], long[:1])
    assert cos_sin(rope, 16, torch.empty(2, 0, dtype=torch.long))[0].shape == (2, 0, 8)


def drawn_angles(*shape: int, seed: int) -> Tensor:
    return 100 * randn(*shape, seed=seed + 1, dtype=torch.float64)


CASES = st.tuples(st.integers(1, 3), st.integers(0, 4), EVEN, SEEDS)  # B, L, R, seed


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """What is written everywhere: ``x cos + partner(x) sin``, in the dtype of ``x``."""
    if pairing == "interleaved":
        partner = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos.repeat_interleave(2, -1) + partner * sin.repeat_interleave(2, -1)
    first, second = x.chunk(2, -1)
    partner = torch.cat([-second, first], -1)
    return x * torch.cat([cos, cos], -1) + partner * torch.cat([sin, sin], -1)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(case=CASES)
def test_rotation_matches_the_oracle(pairing, dtype, case):
    B, L, R, seed = case
    x = randn(B, L, R, seed=seed, dtype=dtype)
    angles = drawn_angles(B, L, R // 2, seed=seed)
    oracle = reference.rotate(x.double(), angles, pairing)
    cos, sin = angles.cos(), angles.sin()
    for table_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        tables = cos.to(table_dtype), sin.to(table_dtype)
        found = rotate(x, *tables, pairing)
        assert found.dtype == dtype
        eager = plain_rotate(x.to(table_dtype), *tables, pairing).to(dtype)
        assert_within_budget(found, oracle, eager, f"{table_dtype} tables")


@pytest.mark.parametrize("pairing", PAIRINGS)
@given(case=CASES)
def test_rotation_keeps_lengths_and_can_be_undone(pairing, case):
    B, L, R, seed = case
    x = randn(B, L, R, seed=seed, dtype=torch.float64)
    angles = drawn_angles(B, L, R // 2, seed=seed)
    turned = rotate(x, angles.cos(), angles.sin(), pairing)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, angles.cos(), -angles.sin(), pairing), x)


@pytest.mark.parametrize("pairing", PAIRINGS)
@given(R=EVEN, start=st.integers(0, 5000), shift=st.integers(0, 5000), seed=SEEDS)
def test_scores_depend_on_distance_alone(pairing, R, start, shift, seed):
    query, key = randn(2, R, seed=seed, dtype=torch.float64)
    rope = RopeConfig(scaling="linear", factor=3.0)

    def score(query_position: int, key_position: int) -> Tensor:
        positions = torch.tensor([query_position, key_position])
        cos, sin = cos_sin(rope, R, positions, dtype=torch.float64)
        turned_query = rotate(query, cos[0], sin[0], pairing)
        return turned_query @ rotate(key, cos[1], sin[1], pairing)

    wanted = score(start + 17, start)
    torch.testing.assert_close(score(start + shift + 17, start + shift), wanted, rtol=0, atol=1e-9)
    assert R < 4 or not torch.isclose(score(start + 18, start), wanted, rtol=0, atol=1e-9)


@given(case=CASES)
def test_pairings_are_the_same_rotation_of_permuted_numbers(case):
    B, L, R, seed = case
    x = randn(B, L, R, seed=seed)
    angles = drawn_angles(B, L, R // 2, seed=seed).float()
    cos, sin = angles.cos(), angles.sin()
    order = torch.arange(R).view(R // 2, 2).T.flatten()  # evens first, then odds
    interleaved = rotate(x, cos, sin, "interleaved")
    assert torch.equal(rotate(x[..., order], cos, sin, "half"), interleaved[..., order])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_position_zero_turns_nothing(pairing):
    x = randn(3, 16, seed=0)
    cos, sin = cos_sin(RopeConfig(), 16, torch.zeros(3, dtype=torch.int32))
    assert torch.equal(rotate(x, cos, sin, pairing), x)


def test_pairing_none_and_no_rotated_numbers_return_the_input():
    x = randn(2, 8, seed=0)
    cos, sin = cos_sin(RopeConfig(), 8, torch.arange(2))
    assert rotate(x, cos, sin, "none") is x
    empty = x[:, :0]
    assert rotate(empty, *cos_sin(RopeConfig(), 0, torch.arange(2)), "half") is empty


def test_odd_or_differing_widths_are_refused():
    x, table = randn(2, 8, seed=0), torch.ones(2, 3)
    with pytest.raises(ShapeError, match=r"rotate: x has 8 numbers .* cos has 3, expected"):
        rotate(x, table, table, "interleaved")
    with pytest.raises(ShapeError, match="rotate: x has 7 numbers"):
        rotate(x[:, :7], table, table, "half")
    with pytest.raises(ShapeError, match="R has value 7, expected an even number"):
        cos_sin(RopeConfig(), 7, torch.arange(2))
    with pytest.raises(ShapeError, match=r"inv_freq has 2 values, expected R/2 = 3"):
        inverse_frequencies(RopeConfig(inv_freq=(1.0, 0.5)), 6)


@pytest.mark.parametrize("pairing", PAIRINGS)
@given(R=st.sampled_from([2, 6]), seed=SEEDS)
def test_gradient_is_that_of_finite_differences(pairing, R, seed):
    x = randn(2, 3, R, seed=seed, dtype=torch.float64).requires_grad_()
    angles = drawn_angles(3, R // 2, seed=seed)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin(), pairing), x)


def test_input_of_any_strides_is_turned():
    x = randn(2, 4, 3, 20, seed=0).transpose(1, 2)[..., 4:]
    cos, sin = cos_sin(RopeConfig(), 16, torch.arange(4))
    for pairing in PAIRINGS:
        assert torch.equal(rotate(x, cos, sin, pairing), rotate(x.contiguous(), cos, sin, pairing))


@given(positions=POSITIONS, beta=st.floats(0.01, 1.0), trained=st.integers(1, 3000))
def test_position_scale_matches_the_formula(positions, beta, trained):
    rope = RopeConfig(query_scale_beta=beta, original_max_position_embeddings=trained)
    exact = [1 + beta * math.log(1 + p // trained) for p in positions]
    found = query_position_scale(rope, torch.tensor(positions), dtype=torch.float64)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64))


def test_without_beta_there_is_no_position_scale():
    assert query_position_scale(RopeConfig(), torch.arange(3)) is None


YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=8)
LONGROPE = RopeConfig(
    scaling="longrope",
    factor=2.0,
    original_max_position_embeddings=8,
    short_factor=SHORT,
    long_factor=LONG,
)


def turn(x: Tensor, positions: Tensor) -> Tensor:
    for rope, pairing in ((YARN, "interleaved"), (LONGROPE, "half")):
        x = rotate(x, *cos_sin(rope, x.shape[-1], positions), pairing)  # type: ignore[arg-type]
    return x


def test_compiles_without_breaks_and_without_recompiling():
    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(randn(5, 16, seed=0), torch.arange(5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for L in (12, 7):
            x, positions = randn(L, 16, seed=L), torch.arange(L)
            torch.testing.assert_close(compiled(x, positions), turn(x, positions))


def test_fake_and_meta_tensors_pass_and_leave_nothing_behind():
    x, positions = randn(5, 16, seed=0), torch.arange(5)
    with FakeTensorMode() as mode:  # reading a value on the host would raise here
        faked = turn(mode.from_tensor(x), mode.from_tensor(positions))
    assert faked.shape == x.shape
    assert turn(x.to("meta"), positions.to("meta")).device.type == "meta"
    assert type(turn(x, positions)) is Tensor


def test_tables_made_under_inference_mode_serve_training():
    x, positions = randn(5, 16, seed=0).requires_grad_(), torch.arange(5)
    rope = RopeConfig(theta=777.0)  # not kept by an earlier test
    with torch.inference_mode():
        cos_sin(rope, 16, positions)
    rotate(x, *cos_sin(rope, 16, positions), "half").sum().backward()
    assert x.grad is not None
