"""How many devices share one batch best: data x tensor x context parallel.

    devices = data * tensor * context

Each of ``data`` groups has its share of the sequences and its own weights and cache, and exchanges
nothing with the others. Of all splits whose cache fits into the memory set
aside for it, the best has the shortest step of the busiest device; where two are equal, the one
that sends fewer bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mla.checks import ShapeError
from mla.config import MLAConfig
from mla.plan.devices import Device
from mla.plan.roofline import Group, Load, Step, decode_step


class Split(NamedTuple):
    """One way to use all devices, and what a step costs on the busiest of them."""

    num_devices: int
    data: int
    group: Group
    step: Step

    @property
    def tokens_per_second(self) -> float:
        """Of all groups; they have as many sequences each where the batch divides."""
        return self.data * self.step.tokens_per_second


def splits(
    layers: Sequence[MLAConfig], load: Load, num_devices: int
) -> Iterator[tuple[int, Group]]:
    """Every (data, group) of ``num_devices``: shares of the batch, the heads and the cached tokens
    that divide, apart from the tokens, of which every device has at least one."""
    for data in _divisors(num_devices):
        if load.batch % data:
            continue
        for tensor in _divisors(num_devices // data):
            context = num_devices // data // tensor
            divides = all(layer.num_attention_heads % tensor == 0 for layer in layers)
            if divides and context <= load.context_length:
                yield data, Group(tensor, context)


def best_split(
    layers: Sequence[MLAConfig],
    load: Load,
    device: Device,
    num_devices: int,
    *,
    memory_for_cache: float | None = None,
    **options: Any,
) -> Split | None:
    """The split with the shortest step, or None where none fits.

    Args:
        layers: one config for each layer.
        load: its batch is that of all devices together.
        device: limits of each.
        num_devices: how many, at least 1.
        memory_for_cache: bytes of each device; None: all of its memory.
        options: of `mla.plan.roofline.decode_step`.

    Raises:
        ShapeError: a size is out of range.
    """
    if num_devices < 1:
        raise ShapeError(f"best_split: num_devices has value {num_devices}, expected at least 1")
    memory = device.memory if memory_for_cache is None else memory_for_cache
    found = []
    for data, group in splits(layers, load, num_devices):
        part = load._replace(batch=load.batch // data)
        step = decode_step(layers, part, device, group, **options)
        if step.cache_bytes <= memory:
            found.append(Split(num_devices, data, group, step))
    return min(found, key=lambda one: (one.step.seconds, one.step.bytes_sent), default=None)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
