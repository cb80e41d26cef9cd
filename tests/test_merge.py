"""merge_partials: exact, in any order, blind to what empty parts hold, differentiable."""

from __future__ import annotations

import torch
from helpers import assert_lse_within_budget, assert_within_budget, generator
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, decode_cases

from mla import reference
from mla.ops import merge_partials, mla_decode
from mla.view import CacheView

F64 = torch.float64
CASES = st.fixed_dictionaries(
    {
        "X": st.integers(1, 9),
        "lead": st.sampled_from([(3,), (2, 1, 5), (1, 4, 3)]),
        "W": st.sampled_from([1, 7, 40]),
        "seed": SEEDS,
        "empty": st.sampled_from([0.0, 0.3, 0.8]),
        "spread": st.sampled_from([1.0, 30.0, 1000.0]),
    }
)
PRECISE = st.sampled_from([torch.float32, F64])


def make_partials(X, lead, W, seed, empty=0.0, spread=4.0, dtype=F64):
    """Random partials; ``empty`` is the share of parts that saw no key."""
    rng = generator(seed)
    out = torch.randn(X, *lead, W, generator=rng, dtype=F64)
    lse = spread * torch.randn(X, *lead, generator=rng, dtype=F64)
    is_empty = torch.rand(X, *lead, generator=rng) < empty
    lse[is_empty] = float("-inf")
    out[is_empty] = float("nan")  # an empty part is never written
    return out.to(dtype), lse.to(dtype)


@given(case=CASES, dtype=PRECISE)
def test_matches_the_oracle(case, dtype):
    out, lse = make_partials(**case, dtype=dtype)
    merged = merge_partials(out, lse)
    oracle = reference.merge_partials(out.double(), lse.double())
    plain = reference.merge_partials(out, lse)
    assert merged.out.dtype == merged.lse.dtype == dtype
    # The weights are no better than the rounding of lse, the oracle's own included.
    assert_within_budget(merged.out, oracle.out, plain.out, "out", least=case["spread"])
    assert_lse_within_budget(merged.lse, oracle.lse, plain.lse)


@given(case=CASES, data=st.data())
def test_order_of_parts_is_irrelevant(case, data):
    out, lse = make_partials(**case)
    order = data.draw(st.permutations(range(case["X"])))
    merged, shuffled = merge_partials(out, lse), merge_partials(out[order], lse[order])
    torch.testing.assert_close(merged.out, shuffled.out)
    torch.testing.assert_close(merged.lse, shuffled.lse)


@given(case=CASES, data=st.data())
def test_merging_in_two_steps_changes_nothing(case, data):
    out, lse = make_partials(**case)
    cut = data.draw(st.integers(1, case["X"]))
    first = merge_partials(out[:cut], lse[:cut])
    both = [first, *((out[x], lse[x]) for x in range(cut, case["X"]))]
    stepwise = merge_partials(*(torch.stack(parts) for parts in zip(*both, strict=True)))
    merged = merge_partials(out, lse)
    torch.testing.assert_close(stepwise.out, merged.out)
    torch.testing.assert_close(stepwise.lse, merged.lse)


@given(case=CASES)
def test_empty_parts_are_inert(case):
    """What they hold changes no bit; their number only the order of sums."""
    out, lse = make_partials(**case)
    merged = merge_partials(out, lse)
    is_empty = (lse == float("-inf"))[..., None]
    other = merge_partials(out.masked_fill(is_empty, float("inf")), lse)
    extra = torch.full_like(lse[:1], float("-inf"))
    more = merge_partials(torch.cat([out, out[:1] * float("nan")]), torch.cat([lse, extra]))
    assert torch.equal(merged.out, other.out) and torch.equal(merged.lse, other.lse)
    torch.testing.assert_close(more.out, merged.out)
    torch.testing.assert_close(more.lse, merged.lse)


def test_rows_with_no_keys_are_zero_and_minus_inf():
    out, lse = make_partials(X=3, lead=(2, 4), W=5, seed=0, empty=1.1)
    merged = merge_partials(out, lse)
    assert (merged.out == 0).all() and (merged.lse == float("-inf")).all()


def test_one_part_is_itself_and_equal_parts_add_log_of_their_number():
    out, lse = make_partials(X=1, lead=(2, 4), W=5, seed=0)
    torch.testing.assert_close(merge_partials(out, lse).out, out[0])
    four = merge_partials(out.expand(4, -1, -1, -1), lse.expand(4, -1, -1))
    torch.testing.assert_close(four.out, out[0])
    torch.testing.assert_close(four.lse, lse[0] + torch.log(torch.tensor(4.0, dtype=F64)))


@given(case=decode_cases(page_size=None, dtype=F64, query_lengths=None, starts=None, L=1),
       data=st.data())  # fmt: skip
def test_splits_of_the_keys_merge_to_the_whole(case, data):
    """A base-2 log-sum-exp, or a weight without it, would show here."""
    view = case.view()
    cuts = sorted(data.draw(st.lists(st.integers(0, case.S), max_size=4)))
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, case.S], strict=True):
        part = CacheView.dense(
            view.rows,
            view.lengths.clamp(max=end),
            C=case.C,
            R=case.R,
            starts=torch.full_like(view.lengths, begin),
        )
        parts.append(mla_decode(*case.queries(), part, scale=case.scale))
    out, lse = merge_partials(*(torch.stack(x) for x in zip(*parts, strict=True)))
    whole = mla_decode(*case.queries(), view, scale=case.scale)
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse)


@given(seed=SEEDS, X=st.integers(1, 4))
def test_gradients(seed, X):
    out, lse = make_partials(X=X, lead=(2, 3), W=3, seed=seed)
    assert torch.autograd.gradcheck(
        lambda *x: tuple(merge_partials(*x)), (out.requires_grad_(), lse.requires_grad_())
    )


@given(case=CASES)
def test_gradients_of_empty_parts_are_zero(case):
    out, lse = make_partials(**case)
    inputs = (out.requires_grad_(), lse.requires_grad_())
    merged = merge_partials(*inputs)
    seen = merged.lse.detach() != float("-inf")
    loss = merged.out.square().sum() + merged.lse[seen].sum()
    grads = torch.autograd.grad(loss, inputs)
    is_empty = lse.detach() == float("-inf")
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][is_empty] == 0).all() and (grads[1][is_empty] == 0).all()
    oracle = reference.merge_partials(*inputs)
    expected = torch.autograd.grad(oracle.out.square().sum() + oracle.lse[seen].sum(), inputs)
    torch.testing.assert_close(grads[0], expected[0].nan_to_num(0.0))
    torch.testing.assert_close(grads[1], expected[1].nan_to_num(0.0))
