"""The plain PyTorch decode inside: chunks, grouped rows, what it reads and what it copies."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from helpers import assert_lse_within_budget, assert_within_budget, make_view, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, DecodeCase, decode_cases

from mla import reference
from mla.kernels.eager import decode as eager
from mla.kernels.eager.rows import fetch, fetch_masked, local_count
from mla.ops import mla_decode
from mla.view import CacheView

F64 = torch.float64
# One long row, several rows of one length, ragged rows.
LONG = st.sampled_from([(40,), (70,), (64, 64), (33, 33, 50)])


def run(case: DecodeCase, view: CacheView) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"scale": case.scale, "query_lengths": case.counts()}
    return mla_decode(*case.queries(), view, **options, impl="torch")


@given(
    case=decode_cases(lengths=LONG, dtype=F64, codec=st.sampled_from(CODECS)),
    keys=st.sampled_from([1, 3, 8, 16]),
    most=st.sampled_from([1, 50, 300, 1 << 24]),
)
def test_chunks_give_what_one_product_gives(case, keys, most):
    view = case.view()
    out, lse = run(case, view)
    with patch.object(eager, "KEYS_PER_CHUNK", keys), patch.object(eager, "MAX_SCORES", most):
        chunked = run(case, view)
    torch.testing.assert_close(chunked[0], out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(chunked[1], lse, rtol=1e-12, atol=1e-13)


@given(
    case=decode_cases(lengths=LONG, dtype=st.sampled_from([torch.bfloat16, torch.float16])),
    keys=st.sampled_from([1, 8, 16]),
    widened=st.sampled_from([1, 300, 1 << 24]),
    multiplies=st.booleans(),
)
def test_16_bit_chunks_lose_no_more_than_one_product(case, keys, widened, multiplies):
    exact, plain = attend(case, F64), attend(case, case.dtype)
    with (
        patch.object(eager, "KEYS_PER_CHUNK", keys),
        patch.object(eager, "MAX_WIDENED", widened),
        patch.object(eager, "_multiplies", lambda dtype: multiplies),
    ):
        out, lse = eager.decode(*case.queries(), case.view(), case.scale, case.counts(), case.dtype)
    assert_within_budget(out, exact.out, plain.out, "out")
    assert_lse_within_budget(lse, exact.lse, plain.lse)


def attend(case: DecodeCase, dtype: torch.dtype) -> reference.Attention:
    """The oracle's attention in ``dtype``, over rows and queries rounded to that of the case."""
    starts = None if case.starts is None else torch.tensor(case.starts)
    return reference.absorbed_attention(
        *(x.to(dtype) for x in case.queries()),
        *(x.to(case.dtype).to(dtype) for x in case.rows()),
        torch.tensor(case.lengths),
        scale=case.scale,
        starts=starts,
        query_lengths=case.counts(),
    )


@given(
    case=decode_cases(lengths=LONG, dtype=F64, codec=st.sampled_from(CODECS)),
    most=st.sampled_from([1, 50, 300]),
)
def test_masked_chunks_give_what_one_product_gives(case, most):
    view = case.view()
    query = torch.cat(case.queries(), dim=-1)
    out, lse = eager.decode_masked(query, view, case.scale, case.counts())
    with patch.object(eager, "MAX_SCORES", most):
        chunked = eager.decode_masked(query, view, case.scale, case.counts())
    torch.testing.assert_close(chunked[0], out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(chunked[1], lse, rtol=1e-12, atol=1e-13)


@given(case=decode_cases(dtype=F64, codec=st.sampled_from(CODECS)), max_length=st.integers(0, 60))
def test_masked_and_sliced_paths_agree_for_every_host_bound(case, max_length):
    view = case.view()
    view = view.with_length(min(max(max_length, case.S), view.capacity))
    out, lse = eager.decode(*case.queries(), view, case.scale, case.counts(), F64)
    with patch.object(eager, "_runs", side_effect=AssertionError("reads lengths on the host")):
        masked = eager.decode_masked(
            torch.cat(_rotated(case, view), dim=-1), view, case.scale, case.counts()
        )
    masked_out = eager.rotate_latent(masked[0]) if view.codec.rotation else masked[0]
    torch.testing.assert_close(masked_out, out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(masked[1], lse, rtol=1e-12, atol=1e-13)


def _rotated(case: DecodeCase, view: CacheView) -> tuple[torch.Tensor, torch.Tensor]:
    q_latent, q_rope = case.queries()
    return (eager.rotate_latent(q_latent) if view.codec.rotation else q_latent), q_rope


@given(
    page_size=st.integers(1, 5),
    count=st.integers(1, 4),
    position=st.integers(-3, 60),
)
def test_local_count_counts_the_positions_of_a_shard(page_size, count, position):
    held = []
    for index in range(count):
        view = CacheView.paged(
            torch.empty(1, page_size, 4),
            torch.zeros(1, 20, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            C=4,
            R=0,
            shard=(index, count),
        )
        held.append(local_count(view, position))
        assert held[-1] == sum(p // page_size % count == index for p in range(position))
    assert sum(held) == max(position, 0)


def test_equal_neighbours_are_one_run():
    view = make_view(
        randn(5, 9, 4, seed=0, dtype=F64),
        randn(5, 9, 2, seed=1, dtype=F64),
        [7, 7, 7, 9, 7],
        starts=[0, 0, 1, 1, 1],
    )
    runs = [(run.b0, run.b1, run.begin, run.ends) for run in eager._runs(view, 2, None)]
    assert runs == [(0, 2, 0, (6, 7)), (2, 3, 1, (6, 7)), (3, 4, 1, (8, 9)), (4, 5, 1, (6, 7))]


def test_long_rows_stay_alone_where_they_are_faster_alone():
    view = make_view(
        randn(4, 9, 4, seed=0, dtype=F64), randn(4, 9, 2, seed=1, dtype=F64), [8, 8, 9, 9]
    )
    runs = [(run.b0, run.b1) for run in eager._runs(view, 1, None, 9)]
    assert runs == [(0, 2), (2, 3), (3, 4)]


def test_plain_dense_rows_are_read_in_place():
    view = make_view(randn(2, 9, 4, seed=0, dtype=F64), randn(2, 9, 2, seed=1, dtype=F64), [9, 9])
    rows = fetch(view, 1, 2, 3, 9, torch.float32)
    assert rows.data_ptr() == view.rows[1, 3].data_ptr() and rows.shape == (1, 6, 6)


@pytest.mark.parametrize("page_size", [None, 2])
def test_masked_rows_are_zero_where_nothing_is_stored(page_size):
    latent, k_rope = randn(2, 9, 4, seed=0, dtype=F64), randn(2, 9, 2, seed=1, dtype=F64)
    view = make_view(latent, k_rope, [9, 4], dtype=F64, starts=[2, 0], page_size=page_size)
    rows, positions, stored = fetch_masked(view.with_length(9), F64)
    expected = torch.cat([latent, k_rope], dim=-1)
    expected[0, :2] = expected[1, 4:] = 0
    count = int((positions < 9).sum())
    assert count == 9 and torch.equal(positions[:9], torch.arange(9))
    assert torch.equal(rows[:, :9], expected) and (rows[:, 9:] == 0).all()
    assert torch.equal(stored.sum(1), torch.tensor([7, 4]))
