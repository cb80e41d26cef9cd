"""Heads sharded over 2 and 4 ranks, held against one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tensor_ranks
import torch
from helpers import assert_within_budget
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processes import RanksFailed, run_ranks
from tensor_ranks import Case, Run

from mla import Fp8Codec, Int4Codec, Int8Codec, MLAConfig, RopeConfig
from mla.parallel import TP_PLAN, head_plan

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking would start hundreds of worlds
SEEDS = st.integers(0, 2**31 - 1)
WORLDS = pytest.mark.parametrize("world_size", [2, 4])
DTYPES = st.sampled_from([torch.float32, torch.float64])
CONFIGS = st.builds(
    lambda h, q, c, r, v, pairing, norm, scales, bias: MLAConfig(
        hidden_size=20,
        num_attention_heads=4 * h,
        q_lora_rank=q,
        kv_lora_rank=c,
        qk_nope_head_dim=10,
        qk_rope_head_dim=r,
        v_head_dim=v,
        rope=RopeConfig(pairing=pairing),
        latent_norm=norm,
        query_scale=scales[0],
        latent_scale=scales[1],
        attention_bias=bias,
        query_bias=bias,
    ),
    st.integers(1, 2),
    st.sampled_from([None, 7]),
    st.sampled_from([8, 31]),
    st.sampled_from([0, 2, 6]),
    st.sampled_from([3, 16]),
    st.sampled_from(["interleaved", "half", "none"]),
    st.sampled_from(["rms", "none"]),
    st.sampled_from([(1.0, 1.0), (1.7, 0.6)]),
    st.booleans(),
)
PROMPTS = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
SMALL = Case(
    config=MLAConfig(
        hidden_size=20,
        num_attention_heads=4,
        q_lora_rank=7,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
    ),
    prompt=(5, 3),
)


def check(run: Run, cases: Sequence[Case], world_size: int, dtype: torch.dtype) -> None:
    """Every result of every rank within the budget of one process."""
    ranks = run_ranks(tensor_ranks.on_ranks, world_size, run, cases, dtype)
    for index, case in enumerate(cases):
        oracle = run(case, torch.float64, None)
        eager = run(case, dtype, None)
        for rank, results in enumerate(ranks):
            assert results[index].keys() == oracle.keys()
            for name, actual in results[index].items():
                where = f"{name} of {case} on rank {rank}"
                assert_within_budget(actual, oracle[name], eager[name], where)


@WORLDS
@settings(max_examples=2, phases=PHASES)
@given(
    dtype=DTYPES,
    cases=st.lists(
        st.builds(Case, config=CONFIGS, prompt=PROMPTS, seed=SEEDS), min_size=4, max_size=4
    ),
)
def test_output_and_every_gradient_are_those_of_one_process(dtype, cases, world_size):
    check(tensor_ranks.train, cases, world_size, dtype)


RAGGED = st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any).map(tuple)
STEPS = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@WORLDS
@settings(max_examples=2, phases=PHASES)
@given(
    dtype=DTYPES,
    cases=st.lists(
        st.builds(
            Case,
            config=CONFIGS,
            prompt=RAGGED,
            steps=STEPS,
            page_size=st.sampled_from([None, 2, 5]),
            seed=SEEDS,
        ),
        min_size=4,
        max_size=4,
    ),
)
def test_cached_steps_are_those_of_one_process(dtype, cases, world_size):
    check(tensor_ranks.decode, cases, world_size, dtype)


@settings(max_examples=1, phases=PHASES)
@given(seed=SEEDS)
def test_coded_caches_are_those_of_one_process(seed):
    """In float64: other roundings of the latent would be coded differently now and then."""
    cases = [
        Case(
            config=SMALL.config, prompt=(7, 0, 4), steps=(1, 2), seed=seed, codec=codec, page_size=Z
        )
        for codec in (Fp8Codec(), Int8Codec(), Int4Codec())
        for Z in (None, 3)
    ]
    check(tensor_ranks.decode, cases, 2, torch.float64)


def test_without_the_sum_of_the_rotated_key_its_gradient_is_wrong():
    config = SMALL.config
    case = Case(config=config, prompt=SMALL.prompt, seed=1)
    expected = tensor_ranks.train(case, torch.float64, None)
    actual = run_ranks(tensor_ranks.train_without_the_sum, 2, case, torch.float64)[0]
    error = {
        name: ((actual[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    }
    rotary = error.pop("kv_a_proj_with_mqa.weight")
    assert rotary > 0.1
    assert error.pop("hidden_states") > 0.01
    assert max(error.values()) < 1e-12


def test_parameters_lie_where_the_plan_says():
    config = SMALL.config
    found = run_ranks(tensor_ranks.placements, 2, SMALL)[1]
    cut = {"colwise": "S(0)", "rowwise": "S(1)", "replicate": "R", "mla_kv_a_proj": "R"}
    assert found == {
        name: cut[TP_PLAN[name.rpartition(".")[0]]]
        for name in tensor_ranks.make_layer(config, 0).state_dict()
    }


def test_plan_names_every_layer_inside_a_model():
    layer = tensor_ranks.make_layer(SMALL.config, 0)
    model = torch.nn.ModuleDict({"a": layer, "b": torch.nn.ModuleList([layer])})
    model["b"].append(torch.nn.Linear(2, 2))
    plan = head_plan(layer)
    assert plan == {name: TP_PLAN[name] for name in TP_PLAN if name != "q_proj"}
    assert head_plan(torch.nn.ModuleDict({"a": layer})) == {f"a.{x}": plan[x] for x in plan}
    assert head_plan(torch.nn.Linear(2, 2)) == {}


def test_what_cannot_be_sharded_is_refused_and_left_alone():
    messages = run_ranks(tensor_ranks.refusals, 2, SMALL)[0]
    expected = [
        "ShapeError shard_heads: mesh has 2 dims None, expected one; take one by its name",
        "UnsupportedError shard_heads: module has type Linear without an MLA layer",
        "UnsupportedError shard_heads: module a has q_a_proj.weight with placements (Replicate(),)",
        "UnsupportedError head_plan: module has the parameter kv_b_proj.extra.weight of shape (3,",
        "ShapeError shard_heads: module 1 has H=3 heads, expected a multiple of 2, the size of the "
        "mesh",
    ]
    assert len(messages) == len(expected)
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start), message


def test_a_rank_that_raises_ends_the_others_with_an_error():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(tensor_ranks.raise_on_one_rank, 4, SMALL, timeout=60)
    outcomes = caught.value.outcomes
    assert "rank 1 gives up" in outcomes[1]
    for rank in (0, 2, 3):
        assert "Connection" in outcomes[rank] and "killed" not in outcomes[rank], outcomes[rank]
    assert caught.value.seconds < 50
