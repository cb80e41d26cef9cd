"""The rotation kernel against the oracle's Hadamard matrix."""

from __future__ import annotations

import pytest
from devices import DTYPES, on_cpu, on_device
from helpers import assert_within_budget, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

pytest.importorskip("triton")

from mla.codec import rotate_latent
from mla.kernels.rotate import rotate
from mla.reference import hadamard


@given(
    C=st.sampled_from([1, 5, 24, 40, 128, 130, 384]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=SEEDS,
)
def test_matches_the_oracle(C, dtypes, seed) -> None:
    x = randn(2, 3, C, seed=seed, dtype=dtypes[0])
    found = on_cpu(rotate(on_device(x), dtypes[1]))
    size = 1
    while size < 128 and C % (2 * size) == 0:
        size *= 2
    oracle = (x.double().unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)
    assert_within_budget(found, oracle, rotate_latent(x).to(dtypes[1]), "out")
