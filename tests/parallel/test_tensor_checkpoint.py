"""Checkpoints of sharded heads, read again by another number of ranks."""

import checkpoint_ranks
import pytest
import tensor_ranks
import torch
import torch.distributed.checkpoint as checkpoint
from processes import run_ranks
from tensor_ranks import Case

from mla import MLAConfig

CASE = Case(
    config=MLAConfig(
        hidden_size=20,
        num_attention_heads=4,
        q_lora_rank=7,
        kv_lora_rank=9,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=3,
        attention_bias=True,
        query_bias=True,
    ),
    prompt=(1,),
)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that two ranks wrote."""
    run_ranks(checkpoint_ranks.save, 2, CASE, tmp_path / "saved")
    return tmp_path / "saved"


def expected():
    return tensor_ranks.make(CASE, torch.float32, None).state_dict()


@pytest.mark.parametrize("world_size", [4, 1])
def test_another_number_of_ranks_reads_the_same_bits(folder, world_size):
    for found in run_ranks(checkpoint_ranks.load, world_size, CASE, folder):
        assert found.keys() == expected().keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected().items())


def test_a_process_without_ranks_reads_the_same_bits(folder):
    found = {name: torch.zeros_like(weight) for name, weight in expected().items()}
    checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(found[name], weight) for name, weight in expected().items())
