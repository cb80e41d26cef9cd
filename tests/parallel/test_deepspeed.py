"""The small model under DeepSpeed's ZeRO stage 3; run by `make test-deepspeed`."""

import deepspeed_ranks
import pytest
from processes import run_ranks

pytestmark = pytest.mark.deepspeed


def test_losses_are_those_of_one_process():
    pytest.importorskip("deepspeed", reason="no DeepSpeed: run make test-deepspeed")
    expected = deepspeed_ranks.plain_losses(3)
    assert expected[-1] < expected[0] - 0.05  # it learns
    for losses, held in run_ranks(deepspeed_ranks.zero_losses, 2, 3, timeout=300):
        assert set(held) == {0}, "no parameter is whole between steps"
        # Float32: a loss near 5.5 rounded at 5e-7, from gradients summed in another order.
        assert losses == pytest.approx(expected, abs=2e-5)
