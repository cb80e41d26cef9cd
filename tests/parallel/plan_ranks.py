"""What the ranks run for the bytes that the plan predicts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from helpers import randn
from layers import make_layer
from torch.distributed.device_mesh import init_device_mesh

from mla import MLAConfig, PagedLatentCache
from mla.parallel import shard_heads
from mla.parallel.context_layer import shard_context
from mla.parallel.sequence import shard_of, shard_sequence
from mla.parallel.traffic import count_traffic


class Counts(NamedTuple):
    """Bytes of each kind of collective, as one rank receives them."""

    prefill: dict[str, int]
    step: dict[str, int]


def traffic_of_layer(
    config: MLAConfig, batch: int, num_tokens: int, new_tokens: int, tensor: int
) -> Counts:
    """One layer in float32: a prompt into an empty cache, then one step."""
    sizes = (dist.get_world_size() // tensor, tensor)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("cp", "tp"))
    layer = make_layer(config, 0, torch.float32)
    if tensor > 1:
        shard_heads(layer, mesh["tp"])
    shard_context(layer, mesh["cp"])
    shard = shard_of(mesh["cp"])
    pool = PagedLatentCache(config, num_pages=64, page_size=4, shard=shard, dtype=torch.float32)
    cache = pool.batch([pool.allocate() for _ in range(batch)], max_length=64)
    prompt = randn(batch, num_tokens, config.hidden_size, seed=1).float()
    with torch.no_grad():
        with count_traffic() as prefill:
            layer(shard_sequence(prompt, shard), cache=cache)
        with count_traffic() as step:
            layer(prompt[:, :new_tokens], cache=cache)
    return Counts(dict(prefill.bytes), dict(step.bytes))
