"""Checkpoints of a sharded layer, written by one world and read by another."""

from __future__ import annotations

from pathlib import Path

import tensor_ranks
import torch
import torch.distributed.checkpoint as checkpoint
from tensor_ranks import Case
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mla.parallel import shard_heads


def save(case: Case, folder: Path) -> None:
    """The layer of ``case``, one part from each rank."""
    layer = tensor_ranks.make(case, torch.float32, tensor_ranks.whole_mesh())
    checkpoint.save(layer.state_dict(), checkpoint_id=folder)


def load(case: Case, folder: Path) -> dict[str, Tensor]:
    """What another world reads, gathered; it began with zeros."""
    layer = tensor_ranks.make(case, torch.float32, None)
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    shard_heads(layer, tensor_ranks.whole_mesh())
    state = layer.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    layer.load_state_dict(state)
    assert all(isinstance(weight, DTensor) for weight in layer.parameters())
    return {name: tensor_ranks.whole(weight.detach()) for name, weight in layer.named_parameters()}
