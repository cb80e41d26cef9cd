"""Sequences cut in zigzag order: every position once, equal causal work, and back again."""

from __future__ import annotations

import pytest
import torch
from context_ranks import gather_all
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks

from mla.checks import ShapeError
from mla.parallel.sequence import padded_length, shard_sequence, zigzag_positions


@given(count=st.integers(1, 5), size=st.integers(0, 4))
def test_shards_have_every_position_once_and_the_same_work(count, size):
    length = 2 * count * size
    parts = [zigzag_positions(length, (index, count)) for index in range(count)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(length))
    assert len({int((part + 1).sum()) for part in parts}) == 1  # keys that its queries see


def test_the_order_is_zigzag():
    assert zigzag_positions(8, (0, 2)).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, (1, 2)).tolist() == [2, 3, 4, 5]


@given(length=st.integers(0, 13), count=st.integers(1, 4), dim=st.sampled_from([0, 1, -1]))
def test_shards_are_padded_with_zeros(length, count, dim):
    whole = torch.ones(3, 3, 3).index_select(dim, torch.zeros(length, dtype=torch.long))
    parts = [shard_sequence(whole, (index, count), dim=dim) for index in range(count)]
    assert {part.shape[dim] for part in parts} == {padded_length(length, count) // count}
    assert sum(part.sum() for part in parts) == 9 * length
    order = torch.cat(
        [zigzag_positions(padded_length(length, count), (i, count)) for i in range(count)]
    ).argsort()
    again = torch.cat(parts, dim=dim).index_select(dim, order)
    assert torch.equal(again.narrow(dim, 0, length), whole)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_ranks_gather_the_whole_and_add_up_its_gradients(dim):
    wholes = [randn(*shape, seed=0) for shape in ((6, 8, 4), (12, 1, 16), (4, 4, 0))]
    wholes = [x for x in wholes if x.shape[dim] % 4 == 0]
    for results in run_ranks(gather_all, 2, wholes, dim):
        for (gathered, grad), whole in zip(results, wholes, strict=True):
            assert torch.equal(gathered, whole)
            assert (grad == 3).all()  # 1 from the first rank, 2 from the second


def test_refusals():
    with pytest.raises(ShapeError, match=r"length has value 6, expected a multiple of 4, .* to 8"):
        zigzag_positions(6, (0, 2))
    with pytest.raises(ShapeError, match=r"shard_sequence: shard has value \(2, 2\)"):
        shard_sequence(torch.zeros(1, 4), (2, 2))
