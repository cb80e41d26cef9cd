"""Training of the small model under DeepSpeed's ZeRO stage 3, on the CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import fsdp_ranks
import torch
import torch.distributed as dist
import train_parallel
from train_tiny import batch, loss_of

LEARNING_RATE, STEPS = 1e-2, 5


def plain_losses(seed: int) -> list[float]:
    """One process, plain SGD: the optimizer that divides by nothing."""
    model = _model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for inputs, targets in _batches(seed):
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zero_losses(seed: int) -> tuple[list[float], list[int]]:
    """Means over the ranks, and how many numbers of each parameter lie here between steps."""
    import deepspeed

    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    # gloo instead of collectives of its own, which it would compile here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = _model(seed)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": fsdp_ranks.SETTINGS.batch_size // ranks,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # it clips to a norm of 1 unless told otherwise
        "zero_force_ds_cpu_optimizer": False,  # that one is compiled
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    held = [weight.numel() for weight in model.parameters()]
    losses = []
    for inputs, targets in _batches(seed):
        loss = loss_of(engine, inputs.chunk(ranks)[rank], targets.chunk(ranks)[rank])
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, held


def _model(seed: int) -> torch.nn.Module:
    torch.set_default_dtype(torch.float32)
    return train_parallel.new_model(replace(fsdp_ranks.SETTINGS, seed=seed), fsdp_ranks.SIZES)


def _batches(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [batch(fsdp_ranks.text(), fsdp_ranks.SETTINGS, generator) for _ in range(STEPS)]
