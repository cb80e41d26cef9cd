"""Bytes, flops and time of one decode step of all attention layers, on one device or a group.

Each part of a layer takes the longer of its bytes over the bandwidth and its flops over the peak:

    projections   weights once, hidden states in and out       2 B L flops for each weight
    attention     rows of the cache once, queries, out, lse    2 H (2 C + R) for each query and key
    exchange      what `mla.plan.communication` counts, over the links

and the parts of a layer, and the layers, follow each other. This is a bound: no device reaches all
of its data sheet, launches and small kernels cost time, and nothing overlaps with the exchange.
Embeddings, MLPs and experts are not in here, so that a model can only be slower.

A group of ``tensor * context`` devices works on one batch. Over ``tensor`` devices the heads are
shared and the cache is replicated; over ``context`` devices the cached tokens are shared and the
projections are repeated. Neighbours in ``tensor`` sit beside each other, so a ring crosses nodes
where ``tensor``, or ``tensor * context``, is more than a node has.

Dims: B sequences, L new tokens of each, S cached tokens of each, D model width, H heads, Q query
latent, C latent, N unrotated, R rotated and V value width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from mla.checks import ShapeError
from mla.codec import Codec
from mla.config import MLAConfig
from mla.plan.communication import (
    NOTHING,
    Traffic,
    context_parallel_decode_bytes,
    heads_per_device,
    tensor_parallel_bytes,
)
from mla.plan.cost import absorbed_step, bytes_per_token
from mla.plan.devices import Device, link_of

Limit = Literal["memory", "arithmetic"]


class Group(NamedTuple):
    """Devices that work on one batch together."""

    tensor: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        return self.tensor * self.context


ALONE = Group()


class Load(NamedTuple):
    """What a step asks of every sequence, and how numbers are kept."""

    context_length: int  # S, the new tokens included
    batch: int = 1  # B, of one group
    new_tokens: int = 1  # L
    codec: Codec | None = None  # None: plain rows
    dtype: torch.dtype = torch.bfloat16  # of hidden states, queries, outputs and plain rows
    weight_bits: int = 16


class Work(NamedTuple):
    """Of one device."""

    num_bytes: int
    num_flops: int

    def seconds(self, device: Device) -> float:
        return max(self.times(device))

    def limit(self, device: Device) -> Limit:
        by_memory, by_arithmetic = self.times(device)
        return "memory" if by_memory > by_arithmetic else "arithmetic"

    def times(self, device: Device) -> tuple[float, float]:
        """Seconds for the bytes, and for the flops."""
        return (
            self.num_bytes / device.bytes_per_second,
            self.num_flops / device.flops_per_second,
        )


class Part(NamedTuple):
    """One part of a step, all layers together, on the busiest device."""

    work: Work
    seconds: float
    limit: Limit


class Step(NamedTuple):
    """One decode step of all layers, on the busiest device of the group."""

    num_layers: int
    projections: Part
    attention: Part
    all_reduce: Traffic  # of outputs, over `tensor` devices
    all_gather: Traffic  # of partial results, over `context` devices
    exchange_seconds: float
    new_tokens: int  # of the whole batch
    cache_bytes: int  # of this device

    @property
    def seconds(self) -> float:
        return self.projections.seconds + self.attention.seconds + self.exchange_seconds

    @property
    def bytes_sent(self) -> int:
        return self.all_reduce.sent + self.all_gather.sent

    @property
    def tokens_per_second(self) -> float:
        """Of the group."""
        return self.new_tokens / self.seconds


def cache_bytes_per_token(layers: Sequence[MLAConfig], load: Load) -> int:
    """Of all layers."""
    return sum(bytes_per_token(layer, load.codec, dtype=load.dtype) for layer in layers)


def projection_work(config: MLAConfig, load: Load, group: Group = ALONE) -> Work:
    """Of one layer. Projections onto latents are repeated by every device, the others are shared.

    Raises:
        ShapeError: the heads do not divide.
    """
    heads_per_device(config, group.tensor)
    D, Q = config.hidden_size, config.q_lora_rank
    repeated = D * config.cache_width + (0 if Q is None else D * Q)
    weights = repeated + (absorbed_step(config).fixed - repeated) // group.tensor
    tokens = load.batch * load.new_tokens
    hidden = 2 * tokens * D * load.dtype.itemsize
    return Work(weights * load.weight_bits // 8 + hidden, 2 * tokens * weights)


def attention_work(config: MLAConfig, load: Load, group: Group = ALONE) -> Work:
    """Of one layer: the largest share of the heads and of the cached tokens.

    Raises:
        ShapeError: the heads do not divide.
    """
    H, C, R = heads_per_device(config, group.tensor), config.kv_lora_rank, config.qk_rope_head_dim
    B, L, S = load.batch, load.new_tokens, load.context_length
    share = -(-S // group.context)
    row = bytes_per_token(config, load.codec, dtype=load.dtype)
    queries = B * L * H * ((2 * C + R) * load.dtype.itemsize + 4)
    pairs = B * min(L * share, L * S - L * (L - 1) // 2)
    return Work(B * share * row + queries, 2 * H * (2 * C + R) * pairs)


Share = Callable[[MLAConfig, Load, Group, Device], float]


def _whole_bound(config: MLAConfig, load: Load, group: Group, device: Device) -> float:
    return 1.0


def decode_step(
    layers: Sequence[MLAConfig],
    load: Load,
    device: Device,
    group: Group = ALONE,
    *,
    network: str = "ib-400",
    latency: float = 0.0,
    share: Share = _whole_bound,
) -> Step:
    """Predict one step.

    Args:
        layers: one config for each layer, at least one.
        load: what is asked.
        device: its limits.
        group: how the work is shared.
        network: the link between nodes, a key of `mla.plan.devices.LINKS`.
        latency: seconds for each message of a ring; 0 counts bytes alone.
        share: of the attention's bound that is reached, from measurements; all of it by default.

    Raises:
        ShapeError: a size is out of range, or the heads do not divide.
        UnsupportedError: there is no such link.
    """
    _check(layers, load, group, latency)
    counts = Counter(layers)
    projections = [(projection_work(c, load, group), n) for c, n in counts.items()]
    attention = [(attention_work(c, load, group), n) for c, n in counts.items()]
    shares = [share(c, load, group, device) for c in counts]
    sizes = {"batch": load.batch, "new_tokens": load.new_tokens, "tensor": group.tensor}
    reduced = [(tensor_parallel_bytes(c, dtype=load.dtype, **sizes), n) for c, n in counts.items()]
    gathered = [
        (context_parallel_decode_bytes(c, context=group.context, **sizes), n)
        for c, n in counts.items()
    ]
    all_reduce, all_gather = _total(reduced), _total(gathered)
    inside, between = link_of(device.link), link_of(network)
    tensor_link = inside if group.tensor <= device.node else between
    context_link = inside if group.size <= device.node else between
    exchange = all_reduce.seconds(tensor_link.bytes_per_second, latency)
    exchange += all_gather.seconds(context_link.bytes_per_second, latency)
    tokens = load.batch * -(-load.context_length // group.context)
    return Step(
        num_layers=len(layers),
        projections=_part(projections, [1.0] * len(counts), device),
        attention=_part(attention, shares, device),
        all_reduce=all_reduce,
        all_gather=all_gather,
        exchange_seconds=exchange,
        new_tokens=load.batch * load.new_tokens,
        cache_bytes=tokens * cache_bytes_per_token(layers, load),
    )


def _part(works: Sequence[tuple[Work, int]], shares: Sequence[float], device: Device) -> Part:
    whole = Work(
        sum(work.num_bytes * count for work, count in works),
        sum(work.num_flops * count for work, count in works),
    )
    seconds = sum(
        count * work.seconds(device) / share
        for (work, count), share in zip(works, shares, strict=True)
    )
    return Part(whole, seconds, whole.limit(device))


def _total(traffic: Sequence[tuple[Traffic, int]]) -> Traffic:
    columns = zip(*(tuple(n * count for n in one) for one, count in traffic), strict=True)
    return Traffic(*map(sum, columns)) if traffic else NOTHING


def _check(layers: Sequence[MLAConfig], load: Load, group: Group, latency: float) -> None:
    if not layers:
        raise ShapeError("decode_step: layers has length 0, expected at least 1")
    sizes = {
        "context_length": load.context_length,
        "batch": load.batch,
        "new_tokens": load.new_tokens,
        "tensor": group.tensor,
        "context": group.context,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(
                f"decode_step: {name} has value {size!r}, expected an integer of at least 1"
            )
    if load.new_tokens > load.context_length:
        raise ShapeError(
            f"decode_step: new_tokens has value {load.new_tokens}, expected at most "
            f"context_length = {load.context_length}"
        )
    if not 0 <= latency < float("inf"):
        raise ValueError(f"decode_step: latency has value {latency}, expected at least 0")
