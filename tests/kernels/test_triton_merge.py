"""The merge kernel against the oracle."""

from __future__ import annotations

import torch
from devices import on_cpu, on_device
from helpers import assert_lse_within_budget, assert_within_budget, generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mla import reference
from mla.ops import merge_partials

CASES = st.fixed_dictionaries(
    {
        "X": st.integers(1, 9),
        "Y": st.integers(1, 5),
        "C": st.sampled_from([1, 16, 80, 130]),
        "empty": st.sampled_from([0.0, 0.3, 1.1]),
        "seed": st.integers(0, 2**31 - 1),
    }
)


def make_parts(X: int, Y: int, C: int, empty: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random parts; ``empty`` is the share that saw no key and was never written."""
    rng = generator(seed)
    out = torch.randn(X, 2, Y, C, generator=rng)
    lse = 4 * torch.randn(X, 2, Y, generator=rng)
    is_empty = torch.rand(X, 2, Y, generator=rng) < empty
    lse[is_empty] = float("-inf")
    out[is_empty] = float("nan")
    return out, lse


@given(case=CASES)
def test_matches_the_oracle(case) -> None:
    out, lse = make_parts(**case)
    actual = on_cpu(tuple(merge_partials(*on_device((out, lse)), impl="triton")))
    oracle = reference.merge_partials(out.double(), lse.double())
    plain = reference.merge_partials(out, lse)
    assert_within_budget(actual[0], oracle.out, plain.out, "out")
    assert_lse_within_budget(actual[1], oracle.lse, plain.lse)
