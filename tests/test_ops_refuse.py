"""Every message of the ops once: which argument, what it has, what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mla.checks import ShapeError, UnsupportedError
from mla.ops import (
    merge_partials,
    mla_append,
    mla_decode,
    mla_gather,
    mla_norm_rope_append,
    mla_prefill,
)
from mla.view import CacheView


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def small_view() -> CacheView:
    return CacheView.dense(zeros(2, 8, 6), ints(3, 4), C=4, R=2)


def decode(**changed: Any) -> None:
    arguments = {"q_latent": zeros(2, 1, 3, 4), "q_rope": zeros(2, 1, 3, 2), "view": small_view()}
    mla_decode(**{**arguments, "scale": 1.0, **changed})


def append(**changed: Any) -> None:
    arguments = {"latent": zeros(2, 1, 4), "k_rope": zeros(2, 1, 2)}
    mla_append(small_view(), **{**arguments, **changed})


def fused(**changed: Any) -> None:
    arguments = {
        "kv_a": zeros(2, 1, 6),
        "norm_weight": zeros(4),
        "cos": zeros(2, 1, 1),
        "sin": zeros(2, 1, 1),
        "eps": 1e-6,
        "pairing": "half",
    }
    mla_norm_rope_append(small_view(), **{**arguments, **changed})


def prefill(**changed: Any) -> None:
    arguments = {
        "query": zeros(2, 3, 3, 5 + 2),
        "latent": zeros(2, 4, 4),
        "k_rope": zeros(2, 4, 2),
        "kv_b_weight": zeros(3 * (5 + 6), 4),
    }
    mla_prefill(**{**arguments, "scale": 1.0, **changed})


def packed(**changed: Any) -> None:
    arguments = {
        "query": zeros(6, 3, 5 + 2),
        "latent": zeros(6, 4),
        "k_rope": zeros(6, 2),
        "kv_b_weight": zeros(3 * (5 + 6), 4),
        "cu_seqlens_q": ints(0, 2, 6),
    }
    mla_prefill(**{**arguments, "scale": 1.0, **changed})


def merge(out: torch.Tensor, lse: torch.Tensor) -> None:
    merge_partials(out, lse)


SHAPES = [
    (decode, {"q_latent": zeros(2, 3, 4)}, "q_latent has shape (2, 3, 4), expected [B, L, H, C]"),
    (
        decode,
        {"q_rope": zeros(2, 1, 2, 2)},
        "q_rope has shape (2, 1, 2, 2), expected [B=2, L=1, H=3, R]",
    ),
    (decode, {"q_rope": zeros(2, 1, 3, 3)}, "view has R=2, expected R=3"),
    (decode, {"q_latent": zeros(2, 1, 3, 5)}, "view has C=4, expected C=5"),
    (
        decode,
        {"q_latent": zeros(3, 1, 3, 4), "q_rope": zeros(3, 1, 3, 2)},
        "view has B=2, expected B=3",
    ),
    (
        decode,
        {"q_rope": zeros(2, 1, 3, 2, dtype=torch.float16)},
        "q_rope has dtype torch.float16, expected torch.float32 as q_latent has",
    ),
    (
        decode,
        {"q_latent": zeros(2, 1, 3, 4, device="meta"), "q_rope": zeros(2, 1, 3, 2, device="meta")},
        "view.rows has device cpu, expected meta as q_latent has",
    ),
    (decode, {"query_lengths": ints(1)}, "query_lengths has shape (1,), expected [B=2]"),
    (
        decode,
        {"query_lengths": ints(1, 1, dtype=torch.int64)},
        "query_lengths has dtype torch.int64, expected torch.int32",
    ),
    (decode, {"query_lengths": ints(0, 2)}, "query_lengths has values 0 to 2, expected 0 to L=1"),
    (decode, {"out_dtype": torch.int32}, "out_dtype has value torch.int32, expected float64 to"),
    (append, {"latent": zeros(2, 4)}, "latent has shape (2, 4), expected [B, L, C]"),
    (append, {"k_rope": zeros(2, 2, 2)}, "k_rope has shape (2, 2, 2), expected [B=2, L=1, R]"),
    (append, {"k_rope": zeros(2, 1, 3)}, "view has R=2, expected R=3"),
    (
        append,
        {"k_rope": zeros(2, 1, 2, dtype=torch.float64)},
        "k_rope has dtype torch.float64, expected torch.float32 as latent has",
    ),
    (append, {"new_lengths": ints(0, -1)}, "new_lengths has values -1 to 0, expected 0 to L=1"),
    (fused, {"kv_a": zeros(2, 1, 7)}, "kv_a has shape (2, 1, 7), expected [B=2, L, W=6]"),
    (fused, {"norm_weight": zeros(6)}, "norm_weight has shape (6,), expected [C=4]"),
    (
        fused,
        {"norm_weight": zeros(4, dtype=torch.float16)},
        "norm_weight has dtype torch.float16, expected torch.float32 as kv_a has",
    ),
    (fused, {"cos": zeros(2, 1, 2)}, "cos has shape (2, 1, 2), expected [B=2, L=1, K=1]"),
    (fused, {"sin": zeros(2, 2, 1)}, "sin has shape (2, 2, 1), expected [B=2, L=1, K=1]"),
    (fused, {"new_lengths": ints(1, 2)}, "new_lengths has values 1 to 2, expected 0 to L=1"),
    (prefill, {"query": zeros(6, 3, 7)}, "query has shape (6, 3, 7), expected [B, L, H, E]"),
    (prefill, {"latent": zeros(1, 4, 4)}, "latent has shape (1, 4, 4), expected [B=2, S, C]"),
    (prefill, {"k_rope": zeros(2, 5, 2)}, "k_rope has shape (2, 5, 2), expected [B=2, S=4, R]"),
    (prefill, {"kv_b_weight": zeros(33, 5)}, "kv_b_weight has shape (33, 5), expected [O, C=4]"),
    (
        prefill,
        {"kv_b_weight": zeros(32, 4)},
        "kv_b_weight has 32 rows, expected H*(N+V) with H=3, N=5 and a positive V",
    ),
    (
        prefill,
        {"kv_b_weight": zeros(15, 4)},
        "kv_b_weight has 15 rows, expected H*(N+V) with H=3, N=5 and a positive V",
    ),
    (
        prefill,
        {"k_rope": zeros(2, 4, 8)},
        "k_rope has last dim 8, expected at most 7, the width of a query head",
    ),
    (
        prefill,
        {"kv_b_weight": zeros(33, 4, dtype=torch.float64)},
        "kv_b_weight has dtype torch.float64, expected torch.float32 as query has",
    ),
    (
        prefill,
        {"latent": zeros(2, 4, 4, device="meta")},
        "latent has device meta, expected cpu as query has",
    ),
    (prefill, {"key_lengths": ints(4, 5)}, "key_lengths has values 4 to 5, expected 0 to S=4"),
    (prefill, {"key_starts": ints(0, -1)}, "key_starts has values -1 to 0, expected 0 to S=4"),
    (
        prefill,
        {"cu_seqlens_k": ints(0, 4)},
        "cu_seqlens_q has value None, expected it with cu_seqlens_k",
    ),
    (prefill, {"out_dtype": torch.bool}, "out_dtype has value torch.bool, expected float64 to"),
    (packed, {"key_lengths": ints(2)}, "key_lengths has a value, expected None with cu_seqlens_q"),
    (packed, {"query": zeros(1, 6, 3, 7)}, "query has shape (1, 6, 3, 7), expected [T, H, E]"),
    (packed, {"latent": zeros(5, 4)}, "k_rope has shape (6, 2), expected [T'=5, R]"),
    (
        packed,
        {"cu_seqlens_q": ints(0, 2, 5)},
        "cu_seqlens_q has values [0, 2, 5], expected 0 <= .. <= 6 from 0 to 6, the number of",
    ),
    (packed, {"cu_seqlens_q": ints(1, 6)}, "cu_seqlens_q has values [1, 6], expected"),
    (packed, {"cu_seqlens_q": ints(0, 4, 2, 6)}, "cu_seqlens_q has values [0, 4, 2, 6], expected"),
    (packed, {"cu_seqlens_q": ints(*range(1, 12))}, "cu_seqlens_q has values [1, .., 11]"),
    (packed, {"cu_seqlens_q": ints()}, "cu_seqlens_q has shape (0,), expected at least one"),
    (packed, {"cu_seqlens_q": ints(0, 6)[None]}, "cu_seqlens_q has shape (1, 2), expected [K]"),
    (
        packed,
        {"cu_seqlens_q": ints(0, 6, dtype=torch.int64)},
        "cu_seqlens_q has dtype torch.int64, expected torch.int32",
    ),
    (packed, {"cu_seqlens_k": ints(0, 2, 7)}, "cu_seqlens_k has values [0, 2, 7], expected"),
    (packed, {"cu_seqlens_k": ints(0, 6)}, "cu_seqlens_k has shape (2,), expected (3,) as cu_seq"),
    (
        packed,
        {"cu_seqlens_k": ints(0, 2, 6).to("meta")},
        "cu_seqlens_k has device meta, expected cpu as query has",
    ),
    (
        merge,
        {"out": zeros(2, 3, 4), "lse": zeros(2, 4)},
        "lse has shape (2, 4), expected (2, 3), the leading dims of out, with at least one part",
    ),
    (merge, {"out": zeros(0, 3, 4), "lse": zeros(0, 3)}, "lse has shape (0, 3), expected (0, 3)"),
    (
        merge,
        {"out": zeros(2, 4).half(), "lse": zeros(2)},
        "out, lse have dtypes torch.float16, torch.float32, expected float32 or float64 for both",
    ),
    (
        merge,
        {"out": zeros(2, 4), "lse": zeros(2, device="meta")},
        "lse has device meta, expected cpu as out has",
    ),
]
NAMES = {
    decode: "mla_decode",
    append: "mla_append",
    fused: "mla_norm_rope_append",
    prefill: "mla_prefill",
    packed: "mla_prefill",
    merge: "merge_partials",
}


@pytest.mark.parametrize(("call", "changed", "message"), SHAPES)
def test_shapes_dtypes_devices(call, changed, message):
    with pytest.raises(ShapeError, match=re.escape(f"{NAMES[call]}: {message}")):
        call(**changed)


@pytest.mark.parametrize("call", [decode, append, fused, prefill, packed])
def test_the_unchanged_calls_run(call):
    call()


@pytest.mark.parametrize(("begin", "end"), [(3, 2), (-1, 2)])
def test_ranges(begin, end):
    message = f"mla_gather: begin, end have values {begin}, {end}, expected 0 <= begin <= end"
    with pytest.raises(ShapeError, match=message):
        mla_gather(small_view(), begin, end, dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fused(pairing="both"),
            "mla_norm_rope_append: pairing has value 'both', expected 'interleaved', 'half' or",
        ),
        (
            lambda: prefill(save="nothing"),
            "mla_prefill: save has value 'nothing', expected 'latent' or 'expanded'",
        ),
        (lambda: decode(impl="fast"), "mla_decode: impl='fast' does not exist for this op; this"),
        (lambda: append(impl="fast"), "mla_append: impl='fast' does not exist for this op; this"),
        (lambda: fused(impl="fast"), "mla_append: impl='fast' does not exist for this op; this"),
        (lambda: prefill(impl="fast"), "mla_prefill: impl='fast' does not exist for this op; this"),
        (
            lambda: mla_gather(small_view(), 0, 2, dtype=torch.int32),
            "mla_gather: ",
        ),
        (
            lambda: decode(
                q_latent=zeros(2, 1, 3, 4, dtype=torch.int32),
                q_rope=zeros(2, 1, 3, 2, dtype=torch.int32),
            ),
            "torch needs a floating dtype, got torch.int32",
        ),
    ],
)
def test_options_and_implementations(call, message):
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "changed"),
    [
        (decode, {"query_lengths": ints(0, 2)}),
        (append, {"new_lengths": ints(0, 2)}),
        (fused, {"new_lengths": ints(0, 2)}),
        (prefill, {"key_lengths": ints(4, 5)}),
        (packed, {"cu_seqlens_q": ints(0, 2, 5)}),
    ],
)
def test_compiled_code_refuses_the_same_values(call, changed):
    torch._dynamo.reset()
    with pytest.raises(ShapeError, match="has values"):
        torch.compile(lambda: call(**changed), backend="eager")()


def test_lengths_beyond_the_capacity():
    with pytest.raises(ShapeError, match="lengths has values up to 9, expected at most 8"):
        decode(view=CacheView.dense(zeros(2, 8, 6), ints(3, 9), C=4, R=2))


@pytest.mark.parametrize("page", [-1, 5])
def test_pages_that_do_not_exist(page):
    table = ints(0, 1, page, 2, 3, 3).view(2, 3)
    view = CacheView.paged(zeros(5, 2, 6), table, ints(5, 2), C=4, R=2)
    message = f"page_table has pages {min(page, 0)} to [0-9]+ in use, expected 0 to 4"
    with pytest.raises(ShapeError, match=message):
        decode(view=view)
    view.lengths[0] = 4
    decode(view=view)  # the bad page is no longer in use
