"""Splits of a row: the host counts them as the kernels do, and odd sizes change no result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DecodeCase
from test_triton_decode import check, decode

pytest.importorskip("triton")

import triton
import triton.language as tl

from mla.codec import PlainCodec
from mla.kernels import launch
from mla.kernels.tiles import split_size


@triton.jit
def _count_kernel(
    lengths_ptr,
    counts_ptr,
    SPLIT_KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    length = tl.load(lengths_ptr + tl.program_id(0))
    size = split_size(length, SPLIT_KEYS, MAX_SPLITS, BLOCK_S)
    tl.store(counts_ptr + tl.program_id(0), (length + size - 1) // size)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 70000), min_size=1, max_size=6),
    architecture=st.sampled_from(["sm90", "gfx942", "interpreter"]),
    num_rows=st.sampled_from([1, 16, 20, 128]),
)
def test_splits_are_counted_alike_on_host_and_device(lengths, architecture, num_rows) -> None:
    plan = launch.decode_plan(architecture, num_rows, 512, 64, torch.bfloat16, PlainCodec())
    given_lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros_like(given_lengths)
    _count_kernel[(len(lengths),)](
        given_lengths, counts,
        SPLIT_KEYS=plan.SPLIT_KEYS, MAX_SPLITS=launch.MAX_SPLITS, BLOCK_S=plan.BLOCK_S,
    )  # fmt: skip
    assert counts.tolist() == [plan.num_splits(length) for length in lengths]
    assert max(counts.tolist()) <= launch.MAX_SPLITS


@pytest.mark.parametrize("page_size", [None, 3, 16])
def test_splits_of_odd_sizes_match_the_oracle(page_size, monkeypatch) -> None:
    """150 keys in at most 3 splits: 50 keys, rounded up to whole tiles."""
    monkeypatch.setattr(launch, "MAX_SPLITS", 3)
    lengths = (150, 97, 33, 1)
    case = DecodeCase(
        2, 3, 24, 6, lengths, None, None, page_size, PlainCodec(), torch.float32, (1.0, 1.0), 5
    )
    check(case)


def test_a_longer_row_in_the_batch_changes_no_bit_of_a_shorter_one() -> None:
    """The workspace has room for the longest row; the others' splits stay their own."""
    case = DecodeCase(
        1, 3, 24, 6, (70, 150), None, None, 16, PlainCodec(), torch.float32, (1.0, 1.0), 7
    )
    view = case.view()
    shorter = replace(view, lengths=torch.tensor([70, 20], dtype=torch.int32), max_length=70)
    together, apart = decode(case, view), decode(case, shorter)
    assert torch.equal(together.out[0], apart.out[0])
    assert not torch.equal(together.out[1], apart.out[1])
