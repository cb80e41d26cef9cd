"""The face of FlashInfer's MLA wrapper against the oracle, its plan, and what it refuses."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from faces import attend, face_cases
from helpers import assert_lse_within_budget, assert_within_budget, poison_
from hypothesis import given
from hypothesis import strategies as st
from strategies import DecodeCase
from torch import Tensor

from mla.checks import ShapeError, UnsupportedError
from mla.codec import Fp8Codec, PlainCodec
from mla.integrations.flashinfer import BatchMLAPagedAttentionWrapper
from mla.view import CacheView

F64 = torch.float64


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def indptr(counts: list[int]) -> Tensor:
    return ints([sum(counts[:i]) for i in range(len(counts) + 1)])


def counts_of(case: DecodeCase) -> list[int]:
    return [case.L] * case.B if case.query_lengths is None else list(case.query_lengths)


def arrays(case: DecodeCase, view: CacheView, *, spare: int = 0) -> dict[str, Tensor]:
    """The page table as FlashInfer has it: all pages of all rows in one list."""
    Z = view.rows.shape[1]
    num_pages = [-(-length // Z) for length in case.lengths]
    pages = [view.page_table[b, :n] for b, n in enumerate(num_pages)]
    return {
        "qo_indptr": indptr(counts_of(case)),
        "kv_indptr": indptr(num_pages),
        "kv_indices": torch.cat([*pages, ints([2**31 - 1] * spare)]),  # a buffer may be longer
        "kv_len_arr": ints(list(case.lengths)),
    }


def planned(case: DecodeCase, view: CacheView, **changes: Any) -> BatchMLAPagedAttentionWrapper:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(0, dtype=torch.int8))
    options = {
        **arrays(case, view, spare=2),
        "num_heads": case.H,
        "head_dim_ckv": case.C,
        "head_dim_kpe": case.R,
        "page_size": view.rows.shape[1],
        "causal": True,
        "sm_scale": case.scale,
        "q_data_type": case.dtype,
        "kv_data_type": view.rows.dtype,
    }
    wrapper.plan(**{**options, **changes})
    return wrapper


def tokens(case: DecodeCase, x: Tensor) -> Tensor:
    """``[B, L, ..]`` -> ``[T, ..]``, the tokens that exist."""
    return torch.cat([row[:n] for row, n in zip(x, counts_of(case), strict=True)])


def caches(view: CacheView, *, are_separate: bool = False) -> tuple[Tensor, Tensor | None]:
    if isinstance(view.codec, Fp8Codec):
        return view.rows, None
    parts = view.rows.split([view.C, view.R], dim=-1)
    return tuple(x.clone() for x in parts) if are_separate else tuple(parts)


CASES = st.one_of(
    face_cases(),
    st.integers(1, 3).flatmap(
        lambda B: face_cases(
            lengths=st.tuples(*[st.integers(0, 40)] * B),
            query_lengths=st.tuples(*[st.integers(0, 5)] * B),
            L=5,
        )
    ),
)


@given(case=CASES, causal=st.booleans(), are_separate=st.booleans(), base_e=st.booleans())
def test_matches_the_oracle(case, causal, are_separate, base_e):
    view = case.view()
    wrapper = planned(case, view, causal=causal)
    q_nope, q_pe = (tokens(case, q) for q in case.queries())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out, lse = wrapper.run(
            q_nope,
            q_pe,
            *caches(view, are_separate=are_separate),
            return_lse=True,
            return_lse_base_on_e=base_e,
        )
    assert (out.dtype, out.shape, lse.shape) == (case.dtype, q_nope.shape, q_nope.shape[:2])
    if len(out) == 0:
        return
    options = {"causal": causal, "scale": case.scale}
    oracle, plain = (
        [tokens(case, x) for x in attend(case, view, dtype=dtype, **options)]
        for dtype in (F64, case.dtype)
    )
    assert_within_budget(out, oracle[0], plain[0], "out")
    factor = 1.0 if base_e else math.log2(math.e)  # lse in base 2
    least = factor * (case.C + case.R) ** 0.5
    assert_lse_within_budget(lse, factor * oracle[1], factor * plain[1], least=least)


def example(**changes: Any) -> DecodeCase:
    fields = {
        "L": 3,
        "H": 2,
        "C": 24,
        "R": 6,
        "lengths": (5, 0, 7),
        "starts": None,
        "query_lengths": (2, 1, 3),
        "page_size": 4,
        "codec": PlainCodec(),
        "dtype": torch.float32,
        "magnitudes": (1.0, 1.0),
        "seed": 1,
    }
    return DecodeCase(**{**fields, **changes})


def run(wrapper: BatchMLAPagedAttentionWrapper, case: DecodeCase, **options: Any) -> Any:
    arguments = dict(zip(("ckv_cache", "kpe_cache"), caches(case.view()), strict=True))
    arguments |= {
        name: tokens(case, q) for name, q in zip(("q_nope", "q_pe"), case.queries(), strict=True)
    }
    return wrapper.run(**{**arguments, **options})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_lengths", [(), (0, 0), (0, 2)])
def test_rows_that_have_no_page_at_all(query_lengths, causal):
    case = example(lengths=(0,) * len(query_lengths), query_lengths=query_lengths)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(0))
    T = sum(query_lengths)
    nothing = indptr([0] * case.B)
    wrapper.plan(
        indptr(counts_of(case)),
        *(nothing, ints([]), ints([0] * case.B), 2, 24, 6, 4, causal, 1.0),
        *(torch.float32, torch.float32),
    )
    rows = poison_(torch.empty(5, 4, 30))
    q_nope, q_pe = torch.ones(T, 2, 24), torch.ones(T, 2, 6)
    out, lse = wrapper.run(q_nope, q_pe, rows[..., :24], rows[..., 24:], return_lse=True)
    assert torch.equal(out, torch.zeros(T, 2, 24))
    assert torch.equal(lse, torch.full((T, 2), -math.inf))


def test_one_plan_serves_all_layers_and_a_new_plan_replaces_it():
    case = example()
    wrapper = planned(case, case.view())
    first = run(wrapper, case)
    assert torch.equal(run(wrapper, case), first)
    other = example(lengths=(3, 1), query_lengths=(1, 1), L=1)
    arguments = arrays(other, other.view())
    wrapper.plan(*arguments.values(), 2, 24, 6, 4, True, other.scale, torch.float32, torch.float32)
    assert run(wrapper, other).shape == (2, 2, 24)
    with pytest.raises(ShapeError, match=re.escape("q_nope has shape (6, 2, 24), expected [T=2,")):
        run(wrapper, case)


def test_out_and_lse_are_written_where_they_are_given():
    case = example()
    wrapper = planned(case, case.view())
    expected_out, expected_lse = run(wrapper, case, return_lse=True)
    out, lse = (poison_(torch.empty_like(x)) for x in (expected_out, expected_lse))
    found = run(wrapper, case, out=out, lse=lse, return_lse=True)
    assert found[0] is out and found[1] is lse
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert run(wrapper, case, out=poison_(out)) is out and torch.equal(out, expected_out)


def test_slices_of_one_buffer_are_read_in_place_and_others_are_copied_with_a_warning(monkeypatch):
    case = example()
    view = case.view()
    wrapper = planned(case, view)
    seen = []
    original = CacheView.paged

    def paged(rows: Tensor, *arguments: Any, **options: Any) -> CacheView:
        seen.append(rows)
        return original(rows, *arguments, **options)

    monkeypatch.setattr(CacheView, "paged", staticmethod(paged))
    ckv, kpe = caches(view)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(wrapper, case, ckv_cache=ckv, kpe_cache=kpe)
    assert seen[-1].data_ptr() == view.rows.data_ptr() and seen[-1].shape == view.rows.shape
    for other in ((ckv.clone(), kpe), (ckv, kpe.clone()), (ckv.clone(), kpe.clone())):
        with pytest.warns(UserWarning, match="no slices of one buffer"):
            found = run(wrapper, case, ckv_cache=other[0], kpe_cache=other[1])
        assert torch.equal(found, expected)
        assert seen[-1].shape[0] == 4, "only the pages of the plan are copied"


def test_slices_in_another_order_are_no_neighbours():
    case = example()
    view = case.view()
    ckv, kpe = caches(view)
    apart = torch.cat([ckv, torch.full_like(kpe, math.nan), kpe], dim=-1)
    swapped = torch.cat([kpe, ckv], dim=-1)
    wrapper = planned(case, view)
    expected = run(wrapper, case, ckv_cache=ckv, kpe_cache=kpe)
    for rows, latent_at, rope_at in ((apart, 0, 30), (swapped, 6, 0)):
        parts = rows[..., latent_at : latent_at + 24], rows[..., rope_at : rope_at + 6]
        with pytest.warns(UserWarning, match="no slices of one buffer"):
            found = run(wrapper, case, ckv_cache=parts[0], kpe_cache=parts[1])
        assert torch.equal(found, expected)


def test_pages_that_do_not_exist_are_refused():
    case = example()
    view = case.view()
    indices = arrays(case, view)["kv_indices"]
    for bad in (-1, view.rows.shape[0]):
        indices[0] = bad
        wrapper = planned(case, view, kv_indices=indices)
        for are_separate in (False, True):
            ckv, kpe = caches(view, are_separate=are_separate)
            with (
                warnings.catch_warnings(),
                pytest.raises(ShapeError, match=r"has (pages|page) .*, ?expected 0 to \d+"),
            ):
                warnings.simplefilter("ignore", UserWarning)
                run(wrapper, case, ckv_cache=ckv, kpe_cache=kpe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph has value True, expected False"),
        ({"backend": "cutlass"}, "backend has value 'cutlass', expected 'auto', 'fa2' or 'fa3'"),
    ],
)
def test_what_the_wrapper_is_not_made_for(options, message):
    with pytest.raises(UnsupportedError, match=f"BatchMLAPagedAttentionWrapper: {message}"):
        BatchMLAPagedAttentionWrapper(torch.empty(0), **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_profiler": True}, UnsupportedError, "use_profiler has a value"),
        ({"use_sinks": True}, UnsupportedError, "use_sinks has a value"),
        ({"block_tables": ints([0])}, UnsupportedError, "block_tables has a value"),
        ({"cum_seq_lens_q": ints([0])}, UnsupportedError, "cum_seq_lens_q has a value"),
        ({"seq_lens": ints([0])}, UnsupportedError, "seq_lens has a value"),
        (
            {"kv_data_type": torch.float8_e4m3fn},
            UnsupportedError,
            "kv_data_type has value torch.float8_e4m3fn, expected torch.float32 as q_data_type",
        ),
        ({"q_data_type": torch.int8}, UnsupportedError, "q_data_type has value torch.int8"),
        (
            {"num_heads": 0},
            ShapeError,
            "num_heads, head_dim_ckv, head_dim_kpe, page_size have values (0, 24, 6, 4)",
        ),
        (
            {"kv_len_arr": ints([5, 1, 7])},
            ShapeError,
            "kv_len_arr has value 1 in row 1, expected 0",
        ),
        ({"kv_len_arr": ints([5, 0, 9])}, ShapeError, "value 9 in row 2, expected 0 to 8, 2 pages"),
        ({"kv_len_arr": ints([5, 0])}, ShapeError, "qo_indptr has shape (4,), expected [3]"),
        (
            {"kv_len_arr": torch.zeros(3)},
            ShapeError,
            "kv_len_arr has dtype torch.float32, expected torch.int32",
        ),
        ({"qo_indptr": ints([0, 2, 1, 6])}, ShapeError, "qo_indptr has values [0, 2, 1, 6]"),
        ({"kv_indptr": ints([1, 2, 3, 4])}, ShapeError, "kv_indptr has values [1, 2, 3, 4]"),
        (
            {"kv_indices": ints([0])},
            ShapeError,
            "kv_indices has shape (1,), expected at least kv_indptr[-1]=4 entries",
        ),
    ],
)
def test_wrong_plans_are_named_and_leave_the_plan_before(changes, error, message):
    case = example()
    view = case.view()
    wrapper = planned(case, view)
    expected = run(wrapper, case)
    options = {
        **arrays(case, view),
        "num_heads": 2,
        "head_dim_ckv": 24,
        "head_dim_kpe": 6,
        "page_size": 4,
        "causal": True,
        "sm_scale": case.scale,
        "q_data_type": torch.float32,
        "kv_data_type": torch.float32,
    }
    with pytest.raises(error, match=re.escape("BatchMLAPagedAttentionWrapper.plan: ")) as raised:
        wrapper.plan(**{**options, **changes})
    assert message in str(raised.value)
    assert torch.equal(run(wrapper, case), expected)


UNAVAILABLE = (
    "profiler_buffer",
    "kv_len",
    "page_table",
    "o_scale",
    "ckv_scale",
    "kpe_scale",
    "sinks",
    "skip_softmax_threshold_scale_factor",
    "bmm1_scale",
    "bmm2_scale",
)


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_what_a_run_does_not_have_is_refused_by_name(name):
    case = example()
    wrapper = planned(case, case.view())
    with pytest.raises(UnsupportedError, match=rf"Wrapper\.run: {name} has a value, expected none"):
        run(wrapper, case, **{name: torch.ones(1)})


def test_wrong_runs_are_named():
    case = example()
    view = case.view()
    wrapper = planned(case, view)
    ckv, kpe = caches(view)
    coded = replace(case, codec=Fp8Codec())
    for changes, message in (
        ({"q_nope": torch.zeros(5, 2, 24)}, "q_nope has shape (5, 2, 24), expected [T=6, H=2, C"),
        ({"q_pe": torch.zeros(6, 2, 5)}, "q_pe has shape (6, 2, 5), expected [T=6, H=2, R=6]"),
        ({"q_pe": torch.zeros(6, 2, 6).half()}, "q_pe has dtype torch.float16, expected torch.fl"),
        ({"ckv_cache": ckv[:, :3]}, "expected [P, Z=4, C=24]"),
        ({"kpe_cache": kpe[:-1]}, "kpe_cache has shape"),
        ({"kpe_cache": None}, "kpe_cache has value None, expected a tensor"),
        ({"ckv_cache": ckv.double()}, "ckv_cache has dtype torch.float64, expected torch.float32"),
        ({"out": torch.zeros(6, 2, 24).half()}, "out has dtype torch.float16, expected torch.fl"),
        ({"lse": torch.zeros(6, 3)}, "lse has shape (6, 3), expected [T=6, H=2]"),
    ):
        with pytest.raises(ShapeError, match=re.escape(message)):
            run(wrapper, case, **changes)
    wrapper = planned(coded, coded.view())
    with pytest.raises(ShapeError, match=re.escape("ckv_cache has shape")):
        run(wrapper, coded, ckv_cache=ckv)
    with pytest.raises(ShapeError, match="kpe_cache has a value, expected None"):
        run(wrapper, coded, kpe_cache=kpe)
    with pytest.raises(ShapeError, match="the wrapper has no plan, expected a call of plan"):
        run(BatchMLAPagedAttentionWrapper(torch.empty(0)), case)
