"""Our ops on DTensors: heads, batch and both sharded; what cannot be is gathered or refused."""

import pytest
import sharding_ranks
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processes import run_ranks

SEEDS = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("world_size", [2, 4])
@settings(max_examples=1, phases=(Phase.reuse, Phase.generate))
@given(seed=SEEDS)
def test_ops_on_dtensors_are_those_on_plain_tensors(seed, world_size):
    for errors in run_ranks(sharding_ranks.errors, world_size, seed):
        assert errors, "nothing was compared"
        worst = {name: error for name, error in errors.items() if not error < 1e-12}
        assert not worst


def test_outputs_lie_as_their_inputs_do():
    placements = run_ranks(sharding_ranks.placements, 2, 0)[0]
    assert placements == {
        "heads": "S(2)",
        "batch": "S(0)",
        "whole": "R",
        "sequence": "R",  # gathered
        "odd heads": "R",  # 3 heads on 2 ranks
        "packed heads": "S(2)",
    }


def test_writing_to_a_cache_through_dtensors_is_refused():
    message = run_ranks(sharding_ranks.append, 2)[0]
    assert "mla.append.default" in message and "sharding strategy" in message
