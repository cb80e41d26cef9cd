"""The small model trained under tensor parallelism, FSDP2 and both, as one process trains it."""

import fsdp_ranks
import pytest
import torch
from fsdp_ranks import Way
from processes import run_ranks

WAYS = {
    "heads": Way(1, 2),
    "fsdp": Way(2, 1),
    "fsdp, recomputed, compiled": Way(2, 1, True, "aot_eager"),
    "heads, recomputed, compiled": Way(1, 2, True, "aot_eager"),
    "heads and fsdp": Way(2, 2),
    "heads and fsdp, recomputed": Way(2, 2, True),
}
SEED = 3


@pytest.fixture(scope="module")
def one_process():
    return fsdp_ranks.one_process(SEED)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_losses_and_text_are_those_of_one_process(way, one_process):
    results = run_ranks(fsdp_ranks.on_ranks, way.dp * way.tp, way, SEED, timeout=120)
    assert one_process.losses[-1] < one_process.losses[0] - 0.3  # it learns
    for losses, written in results:
        # AdamW divides by gradients, of which its eps keeps the smallest at 1e-8: a rounding of
        # 1e-16 moves a weight by at most 1e-8 of a step.
        assert losses == pytest.approx(one_process.losses, abs=1e-8)
        if way.backend is None:
            assert torch.equal(written, one_process.written)
