"""Decode and prefill over ranks against the oracle on one process: drawn cases, many in one go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from context_ranks import (
    DecodeWork,
    PrefillWork,
    compiled_is_eager,
    decode_all,
    prefill_all,
)
from helpers import assert_lse_within_budget, assert_within_budget, randn, stored_rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processes import run_ranks
from strategies import CODECS, DTYPES, HEADS, SEEDS, DecodeCase, decode_cases
from test_decode import attend
from test_prefill import PrefillCase
from torch import Tensor

from mla.absorb import absorb_output
from mla.parallel.sequence import zigzag_positions

F64 = torch.float64
WORLDS = pytest.mark.parametrize("count", [2, 4])
# A world of processes for each example: draw few of many cases, and do not shrink.
DRAWN = settings(max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
TIMEOUT = 180  # seconds; a busy machine starts four processes slowly
CASES = decode_cases(page_size=st.sampled_from([1, 3, 16]), codec=st.sampled_from(CODECS))


def decode_work(case: DecodeCase, count: int, values: int | None) -> DecodeWork:
    w_uv = None
    if values is not None:
        w_uv = randn(case.H, values, case.C, seed=case.seed + 4, dtype=F64) * case.C**-0.5
        w_uv = w_uv.to(case.dtype)
    views = [case.view((index, count)) for index in range(count)]
    options = {"scale": case.scale, "query_lengths": case.counts()}
    return DecodeWork(*case.queries(), views, w_uv, options)


@WORLDS
@DRAWN
@given(cases=st.lists(st.tuples(CASES, st.none() | st.integers(1, 9)), min_size=12, max_size=12))
def test_decode_matches_the_oracle(cases, count):
    work = [decode_work(case, count, values) for case, values in cases]
    ranks = run_ranks(decode_all, count, work, timeout=TIMEOUT)
    for i, (case, _) in enumerate(cases):
        check_decode(case, work[i].w_uv, [results[i] for results in ranks])


def check_decode(case: DecodeCase, w_uv: Tensor | None, ranks: list[Any]) -> None:
    rows = stored_rows(case.view(), case.S)
    oracle, plain = attend(case, rows, F64), attend(case, rows, case.dtype)
    plain_lse = attend(case, rows, torch.promote_types(case.dtype, torch.float32)).lse
    outs = [oracle.out, plain.out]
    if w_uv is not None:
        outs = [absorb_output(out, w_uv.to(out.dtype)) for out in outs]
    out, lse = ranks[0]
    assert out.dtype == case.dtype
    assert_within_budget(out, *outs, "out")
    if case.dtype in (torch.float32, F64):
        least = (case.C + case.R) ** 0.5
        assert_lse_within_budget(lse, oracle.lse, plain_lse, least=least)
    for other in ranks[1:]:
        assert torch.equal(other[0], out) and torch.equal(other[1], lse)


@st.composite
def prefill_cases(draw: Any, count: int) -> PrefillCase:
    S = draw(st.integers(1, 4)) * 2 * count
    N, R = draw(st.sampled_from([(3, 2), (8, 0), (0, 6), (12, 2)]))
    return PrefillCase(
        B=draw(st.integers(1, 3)),
        S=S,
        L=S,
        H=draw(HEADS),
        C=draw(st.sampled_from([5, 9, 24])),
        N=N,
        R=R,
        V=draw(st.sampled_from([1, 5, 14])),
        causal=True,
        key_starts=None,
        key_lengths=None,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(SEEDS),
    )


@WORLDS
@DRAWN
@given(data=st.data())
def test_prefill_and_gradients_match_the_oracle(data, count):
    cases = data.draw(st.lists(prefill_cases(count), min_size=6, max_size=6))
    work = [PrefillWork(case.inputs(), output_grads(case), case.scale) for case in cases]
    ranks = run_ranks(prefill_all, count, work, timeout=TIMEOUT)
    for i, case in enumerate(cases):
        check_prefill(case, work[i].grads, [results[i] for results in ranks])


def output_grads(case: PrefillCase) -> list[Tensor]:
    out = randn(case.B, case.S, case.H, case.V, seed=case.seed + 5, dtype=F64).to(case.dtype)
    dtype = torch.promote_types(case.dtype, torch.float32)
    return [out, randn(case.B, case.S, case.H, seed=case.seed + 6, dtype=F64).to(dtype)]


def check_prefill(case: PrefillCase, grads: list[Tensor], ranks: list[list[Tensor]]) -> None:
    oracle, plain = single(case, grads, F64), single(case, grads, case.dtype)
    count = len(ranks)
    order = torch.cat([zigzag_positions(case.S, (rank, count)) for rank in range(count)]).argsort()
    least = 4 * (case.H * case.V) ** 0.5  # of sums that cancel, as in the tests of one process
    names = ("out", "lse", "query", "latent", "k_rope", "kv_b_weight")
    for i, name in enumerate(names):
        parts = [results[i] for results in ranks]
        if name == "kv_b_weight":
            whole = torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)
        else:
            whole = torch.cat(parts, dim=1)[:, order]
        if name == "lse":
            assert_lse_within_budget(whole, oracle[i], plain[i])
        else:
            size = 0.0 if name == "out" else least
            assert_within_budget(whole, oracle[i], plain[i], name, least=size)


def single(case: PrefillCase, grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the oracle gives in ``dtype`` on one process."""
    leaves = [x.requires_grad_() for x in case.inputs(dtype)]
    outputs = case.oracle(leaves)
    torch.autograd.backward(outputs, [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)])
    return [x.detach() for x in outputs] + [leaf.grad for leaf in leaves]


def test_compiled_calls_give_the_same():
    case = DecodeCase(
        L=2, H=3, C=7, R=2, lengths=(7, 3), starts=None, query_lengths=None, page_size=3,
        codec=CODECS[0], dtype=F64, magnitudes=(1.0, 1.0), seed=0,
    )  # fmt: skip
    inputs = PrefillCase(
        L=6, S=6, H=3, C=5, N=3, R=2, V=4, causal=True, key_starts=None, key_lengths=None, B=2,
        dtype=F64, seed=0,
    ).inputs()  # fmt: skip
    work = decode_work(case, 2, None), PrefillWork(inputs, [], 0.4)
    assert run_ranks(compiled_is_eager, 2, *work, timeout=TIMEOUT) == [[True, True]] * 2
