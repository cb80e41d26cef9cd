"""The face of FlashMLA against the oracle, in both styles of call, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from faces import attend, face_cases
from helpers import assert_lse_within_budget, assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from strategies import DecodeCase

from mla.checks import ShapeError, UnsupportedError
from mla.codec import Fp8Codec
from mla.integrations.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from mla.view import CacheView

F64 = torch.float64
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


def call(case: DecodeCase, view: CacheView, schedule: Any, **options: Any) -> Any:
    """As a user of the original writes it."""
    return flash_mla_with_kvcache(
        torch.cat(case.queries(), dim=-1),
        view.rows.unsqueeze(2),
        view.page_table,
        view.lengths,
        case.C,
        *schedule,
        softmax_scale=case.scale,
        is_fp8_kvcache=view.codec.kind == "fp8",
        **options,
    )


def schedules(case: DecodeCase, view: CacheView) -> list[Any]:
    return [get_mla_metadata(), get_mla_metadata(view.lengths, case.L * case.H, 1)]


@given(case=face_cases(), causal=st.booleans(), style=st.integers(0, 1))
def test_matches_the_oracle(case, causal, style):
    view = case.view()
    out, lse = call(case, view, schedules(case, view)[style], causal=causal)
    options = {"causal": causal, "scale": case.scale}
    oracle = attend(case, view, dtype=F64, **options)
    plain = attend(case, view, dtype=case.dtype, **options)
    assert_within_budget(out, oracle.out, plain.out, "out")
    assert (out.dtype, lse.shape) == (case.dtype, (case.B, case.H, case.L))
    empty = (oracle.lse == -math.inf).transpose(1, 2)
    assert ((lse == math.inf) == empty).all(), "+inf exactly where a query sees no key"
    assert_lse_within_budget(
        lse.transpose(1, 2).masked_fill(empty.transpose(1, 2), -math.inf),
        oracle.lse,
        plain.lse,
        least=(case.C + case.R) ** 0.5,
    )


def test_a_row_without_keys_is_zero_and_plus_infinity():
    case = example(lengths=(0, 2), L=3)
    out, lse = call(case, case.view(), get_mla_metadata(), causal=True)
    assert (out[0] == 0).all() and (lse[0] == math.inf).all()
    assert (out[1, 0] == 0).all() and (lse[1, :, 0] == math.inf).all()
    assert torch.isfinite(lse[1, :, 1:]).all()
    _, lse = call(case, case.view(), get_mla_metadata(), causal=False)
    assert (lse[0] == math.inf).all() and torch.isfinite(lse[1]).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("B", "L", "M"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_no_rows_no_queries_no_pages(B, L, M, causal):
    out, lse = flash_mla_with_kvcache(
        torch.ones(B, L, 3, 6),
        torch.full((5, 4, 1, 6), math.nan),
        zeros(B, M, dtype=torch.int32),
        zeros(B, dtype=torch.int32),
        4,
        *get_mla_metadata(),
        causal=causal,
    )
    assert torch.equal(out, torch.zeros(B, L, 3, 4))
    assert torch.equal(lse, torch.full((B, 3, L), math.inf))


def example(**changes: Any) -> DecodeCase:
    fields = {
        "L": 2,
        "H": 3,
        "C": 24,
        "R": 6,
        "lengths": (5, 0, 7),
        "starts": None,
        "query_lengths": None,
        "page_size": 4,
        "codec": Fp8Codec(),
        "dtype": torch.bfloat16,
        "magnitudes": (1.0, 1.0),
        "seed": 1,
    }
    return DecodeCase(**{**fields, **changes})


@pytest.mark.parametrize("dtype", BYTES)
def test_fp8_rows_may_come_in_any_dtype_of_one_byte(dtype):
    case = example()
    view = case.view()
    expected = call(case, view, get_mla_metadata())
    found = flash_mla_with_kvcache(
        torch.cat(case.queries(), dim=-1),
        view.rows.unsqueeze(2).view(dtype),
        view.page_table,
        view.lengths,
        head_dim_v=24,
        tile_scheduler_metadata=get_mla_metadata()[0],
        softmax_scale=case.scale,
        is_fp8_kvcache=True,
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_default_scale_is_that_of_the_whole_query_width():
    case = example()
    view = case.view()
    arguments = (torch.cat(case.queries(), -1), view.rows.unsqueeze(2), view.page_table)
    options = {"tile_scheduler_metadata": get_mla_metadata()[0], "is_fp8_kvcache": True}
    by_default, _ = flash_mla_with_kvcache(*arguments, view.lengths, 24, **options)
    stated, _ = flash_mla_with_kvcache(
        *arguments, view.lengths, 24, **options, softmax_scale=30**-0.5
    )
    other, _ = flash_mla_with_kvcache(
        *arguments, view.lengths, 24, **options, softmax_scale=24**-0.5
    )
    assert torch.equal(by_default, stated) and not torch.equal(by_default, other)


def test_the_old_tensors_have_the_form_of_the_original_and_follow_no_lengths():
    lengths = torch.tensor([3, 0, 9], dtype=torch.int32)
    metadata, num_splits = get_mla_metadata(lengths, 2 * 16, 1)
    assert (tuple(metadata.shape), metadata.dtype) == ((1, 8), torch.int32)
    assert (num_splits.tolist(), num_splits.dtype) == ([0, 1, 2, 3], torch.int32)
    later = get_mla_metadata(lengths + 5, 2 * 16, num_heads_k=1, num_heads_q=16)
    assert torch.equal(later[0], metadata) and torch.equal(later[1], num_splits)
    with pytest.raises(ShapeError, match=r"get_mla_metadata: cache_seqlens has dtype torch\.int64"):
        get_mla_metadata(lengths.long(), 32, 1)
    with pytest.raises(UnsupportedError, match="get_mla_metadata: topk has a value"):
        get_mla_metadata(lengths, 32, 1, topk=64)


def test_an_object_keeps_to_what_it_was_first_used_for():
    case = example()
    schedule = get_mla_metadata()
    assert isinstance(schedule[0], FlashMLASchedMeta) and schedule[1] is None
    call(case, case.view(), schedule)
    call(example(lengths=(1, 1, 2)), example(lengths=(1, 1, 2)).view(), schedule)
    for other, options, fact in (
        (example(L=1), {}, "shape of q has value (3, 1, 3, 30), expected (3, 2, 3, 30) as in the"),
        (example(page_size=2), {}, "page_size has value 2, expected 4"),
        (case, {"causal": True}, "causal has value True, expected False"),
    ):
        with pytest.raises(ShapeError, match=re.escape(fact)):
            call(other, other.view(), schedule, **options)


SPARSE = (
    "indices",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention_is_refused_by_name(name):
    case = example()
    with pytest.raises(UnsupportedError, match=f"flash_mla_with_kvcache: {name} has a value"):
        call(case, case.view(), get_mla_metadata(), **{name: torch.zeros(1)})


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": zeros(2, 3, 6)}, ShapeError, "q has shape (2, 3, 6), expected [B, L, H, D]"),
        (
            {"k_cache": zeros(5, 4, 2, 6)},
            UnsupportedError,
            "k_cache has 2 key-value heads, expected 1",
        ),
        (
            {"k_cache": zeros(5, 4, 1, 7)},
            ShapeError,
            "k_cache has shape (5, 4, 1, 7), expected a last dim of 6 for C=4, R=2",
        ),
        (
            {"is_fp8_kvcache": True},
            ShapeError,
            "k_cache has shape (5, 4, 1, 6), expected a last dim of 48 for C=4, R=2 in fp8",
        ),
        (
            {"is_fp8_kvcache": True, "k_cache": zeros(5, 4, 1, 48)},
            ShapeError,
            "k_cache has dtype torch.float32, expected one of (torch.uint8,",
        ),
        (
            {"k_cache": zeros(5, 4, 1, 6, dtype=torch.bfloat16)},
            ShapeError,
            "k_cache has dtype torch.bfloat16, expected torch.float32 as q has",
        ),
        ({"head_dim_v": 7}, ShapeError, "head_dim_v has value 7, expected 1 to 6"),
        ({"head_dim_v": 0}, ShapeError, "head_dim_v has value 0, expected 1 to 6"),
        ({"block_table": None}, UnsupportedError, "block_table has value None"),
        ({"cache_seqlens": None}, UnsupportedError, "cache_seqlens has value None"),
        (
            {"block_table": zeros(3, 2, dtype=torch.int32)},
            ShapeError,
            "block_table has shape (3, 2), expected [B=2, M]",
        ),
        (
            {"cache_seqlens": torch.tensor([1, 2])},
            ShapeError,
            "cache_seqlens has dtype torch.int64, expected torch.int32",
        ),
        (
            {"cache_seqlens": torch.tensor([1, 13], dtype=torch.int32)},
            ShapeError,
            "cache_seqlens has values 1 to 13, expected 0 to M*Z=12",
        ),
        (
            {"num_splits": zeros(3, dtype=torch.int32)},
            ShapeError,
            "num_splits has a value, expected None beside the object",
        ),
        (
            {"tile_scheduler_metadata": zeros(1, 7, dtype=torch.int32)},
            ShapeError,
            "tile_scheduler_metadata has shape (1, 7), expected [parts, 8]",
        ),
        (
            {
                "tile_scheduler_metadata": zeros(1, 8, dtype=torch.int32),
                "num_splits": zeros(4, dtype=torch.int32),
            },
            ShapeError,
            "num_splits has shape (4,), expected [3]",
        ),
    ],
)
def test_wrong_arguments_are_named(changed, error, message):
    arguments = {
        "q": zeros(2, 1, 3, 6),
        "k_cache": zeros(5, 4, 1, 6),
        "block_table": zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.tensor([1, 12], dtype=torch.int32),
        "head_dim_v": 4,
        "tile_scheduler_metadata": FlashMLASchedMeta(),
    }
    flash_mla_with_kvcache(**arguments)
    with pytest.raises(error, match=re.escape(f"flash_mla_with_kvcache: {message}")):
        flash_mla_with_kvcache(**{**arguments, **changed})
