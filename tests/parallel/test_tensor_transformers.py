"""Models of transformers with sharded heads: losses, gradients and tokens of one process."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers_ranks
from processes import run_ranks

KINDS = [(kind, is_replaced) for kind in ("deepseek_v3", "youtu") for is_replaced in (False, True)]


def test_sharded_models_train_and_write_as_one_process_does():
    ranks = run_ranks(transformers_ranks.results, 2, KINDS, 1, timeout=120)
    for index, kind in enumerate(KINDS):
        expected = transformers_ranks.result(*kind, 1)
        for results in ranks:
            found = results[index]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12), kind
            assert torch.equal(found["written"], expected["written"]), kind
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                error = (found["gradients"][name] - gradient).abs().max()
                assert error <= 1e-11 * gradient.abs().max(), f"{name} of {kind}: {error:.1e}"
