"""Training of the small model on several ranks, as `examples/train_parallel.py` does it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import train_parallel
from tiny_model import generate
from train_tiny import Settings

SIZES = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "head_dim": 6}
SIZES |= {"kv_lora_rank": 10, "rope_dim": 4}
SETTINGS = Settings(steps=6, batch_size=4, context=12, learning_rate=2e-2)


class Way(NamedTuple):
    """How to train: ranks that share the batch, ranks that share the heads, and the rest."""

    dp: int
    tp: int
    recompute: bool = False
    backend: str | None = None


class Result(NamedTuple):
    losses: list[float]
    written: Tensor | None  # not where steps of generation would be compiled one by one


def text() -> Tensor:
    """Some bytes that follow each other in the same order again and again."""
    return 7 * torch.arange(400) % 23 + 65


def one_process(seed: int) -> Result:
    """Without ranks, and with the default dtype as it was: here other tests go on."""
    dtype = torch.get_default_dtype()
    try:
        return _train(Way(1, 1), seed, None)
    finally:
        torch.set_default_dtype(dtype)


def on_ranks(way: Way, seed: int) -> Result:
    mesh = init_device_mesh("cpu", (way.dp, way.tp), mesh_dim_names=("dp", "tp"))
    return _train(way, seed, mesh)


def _train(way: Way, seed: int, mesh: DeviceMesh | None) -> Result:
    """In float64, where two orders of summation differ by less than any mistake would."""
    torch.set_default_dtype(torch.float64)
    settings = replace(SETTINGS, seed=seed)
    model = train_parallel.new_model(settings, SIZES)
    if mesh is not None:
        train_parallel.parallelize(model, mesh, recompute=way.recompute, backend=way.backend)
    losses = train_parallel.train(model, text(), settings, mesh)
    if way.backend is not None:
        return Result(losses, None)
    return Result(losses, generate(model.eval(), text()[:7], 9, seed=seed))
