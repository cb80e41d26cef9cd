"""Bytes of collectives against their formulas, however they are called."""

from __future__ import annotations

from context_ranks import TRAFFIC_CALLS, traffic_of_all
from processes import run_ranks

# Float32 tensors of 12 numbers on each rank, with k = 3 ranks.
EXPECTED = {
    "all_gather": ("all_gather", 2 * 48),
    "all_gather_list": ("all_gather", 2 * 48),
    "reduce_scatter": ("reduce_scatter", 2 * 16),
    "all_reduce": ("all_reduce", 2 * 2 * 48 // 3),
    "all_to_all": ("all_to_all", 2 * 48 // 3),
    "broadcast": ("broadcast", 48),
    "scatter": ("scatter", 16),
    "functional_all_gather": ("all_gather", 2 * 48),
    "functional_reduce_scatter": ("reduce_scatter", 2 * 16),
    "functional_all_reduce": ("all_reduce", 2 * 2 * 48 // 3),
    "distributed_tensor": ("all_gather", 2 * 48),
    "barrier": None,
    "unknown": "UnsupportedError",
}


def test_bytes_are_those_of_the_formulas():
    assert EXPECTED.keys() == TRAFFIC_CALLS.keys()
    for found in run_ranks(traffic_of_all, 3):
        for name, expected in EXPECTED.items():
            if isinstance(expected, tuple):
                kind, num_bytes = expected
                assert found[name] == ({kind: 1}, {kind: num_bytes}), name
            else:
                assert found[name] == (expected or ({}, {})), name
