"""Masks as runs of keys say the same as the boolean masks of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mla.integrations.transformers.masks import boolean_mask, is_packed, key_run_mask, key_runs

ROW = st.tuples(st.integers(0, 3), st.integers(0, 3))  # padding on the left, on the right
CASES = st.fixed_dictionaries(
    {
        "rows": st.lists(ROW, min_size=1, max_size=4),
        "num_queries": st.integers(1, 6),
        "past": st.integers(0, 7),
        "unfilled": st.integers(0, 9),
        "as_tensor": st.booleans(),
        "with_mask": st.booleans(),
    }
)


def stock_mask(**arguments: Any) -> Tensor:
    """transformers' mask for SDPA, never left out."""
    return sdpa_mask(**arguments, allow_is_causal_skip=False)


LONE_PADDING = {
    "rows": [(0, 1), (1, 0)],
    "num_queries": 1,
    "past": 4,
    "unfilled": 0,
    "as_tensor": False,
    "with_mask": True,
}


@given(case=CASES)
@example(case=LONE_PADDING)
def test_runs_of_keys_equal_the_boolean_mask(case: dict[str, Any]) -> None:
    L, seen = case["num_queries"], case["past"] + case["num_queries"]
    position = torch.arange(seen)
    padding = [(position >= min(a, seen)) & (position < seen - b) for a, b in case["rows"]]
    arguments = {
        "batch_size": len(padding),
        "q_length": L,
        "kv_length": seen + case["unfilled"],
        "q_offset": torch.tensor(case["past"]) if case["as_tensor"] else case["past"],
        "attention_mask": torch.stack(padding) if case["with_mask"] else None,
    }
    mask = key_run_mask(**arguments)
    assert is_packed(mask)
    runs = key_runs(mask, L, seen + case["unfilled"])
    assert runs is not None and runs.num_keys >= seen
    got = boolean_mask(mask, L, seen + case["unfilled"])
    # A query that is padding on the right itself may see anything, unless it is alone.
    is_read = torch.ones(len(padding), 1, L, 1, dtype=torch.bool)
    if case["with_mask"] and L > 1:
        is_read = torch.stack([row[-L:] for row in padding])[:, None, :, None]
    expected = stock_mask(**arguments)
    assert torch.equal(got & is_read, expected & is_read)


@given(seed=st.integers(0, 2**31 - 1), num_queries=st.integers(1, 4), padded=st.booleans())
def test_rows_with_holes_stay_boolean(seed: int, num_queries: int, padded: bool) -> None:
    padding = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    padding[0, 2:5] = torch.tensor([True, False, True])
    if not padded:
        padding[:, 0] = padding[:, -1] = True
    arguments = {
        "batch_size": 3,
        "q_length": num_queries,
        "kv_length": 8,
        "q_offset": 8 - num_queries,
        "attention_mask": padding,
    }
    mask = key_run_mask(**arguments)
    assert key_runs(mask, num_queries, 8) is None
    assert torch.equal(boolean_mask(mask, num_queries, 8), stock_mask(**arguments))


@pytest.mark.parametrize(
    "mask_function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
        masking_utils.and_masks(
            causal_mask_function,
            masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 2]] * 2)),
        ),
    ],
)
def test_other_patterns_stay_boolean(mask_function: Any) -> None:
    arguments = {
        "batch_size": 2,
        "q_length": 6,
        "kv_length": 6,
        "q_offset": 0,
        "mask_function": mask_function,
    }
    mask = key_run_mask(**arguments, allow_is_bidirectional_skip=True)
    assert key_runs(mask, 6, 6) is None
    assert torch.equal(mask, stock_mask(**arguments))


def test_keys_at_an_offset_stay_boolean() -> None:
    arguments = {
        "batch_size": 1,
        "q_length": 2,
        "kv_length": 4,
        "q_offset": 6,
        "kv_offset": 4,
    }
    assert torch.equal(key_run_mask(**arguments), stock_mask(**arguments))


def test_the_mask_of_a_long_prompt_is_small() -> None:
    padding = torch.ones(2, 5000, dtype=torch.bool)
    assert key_run_mask(2, 5000, 5000, attention_mask=padding).numel() == 0
    padding[1, :700] = False
    assert key_run_mask(2, 5000, 5000, attention_mask=padding).numel() == 4
    static = key_run_mask(2, 100, 100_000, q_offset=0, attention_mask=padding[:, 1000:1100])
    assert static.untyped_storage().nbytes() <= 64
    runs = key_runs(static, 100, 100_000)
    assert runs is not None and runs.num_keys == 128  # not every slot is expanded in prefill


def test_no_mask_means_causal_from_the_first_key_on() -> None:
    """As for SDPA in transformers: several queries over more keys are aligned at the top left."""
    assert key_runs(None, 1, 9) == (None, None, 9)
    assert key_runs(None, 4, 9) == (None, None, 4)
    assert key_runs(None, 4, 4) == (None, None, 4)
    assert key_runs(None, 4, 3) is None
