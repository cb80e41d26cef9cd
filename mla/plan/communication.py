"""Bytes that the devices of a group exchange, for one layer and one step.

    tensor parallel, forward     all-reduce of the layer's output [B, L, D]
    context parallel, decode     all-gather of each rank's out [B, L, H, W] and lse [B, L, H],
                                 both float32, merged by log-sum-exp on every rank; W = V where
                                 W_UV is applied before the merge, as the layer does, else W = C
    context parallel, prefill    all-gather of each rank's latents and rotated keys,
                                 [B, S / context, C + R]; the backward pass sends as much again,
                                 in a reduce-scatter of their gradients

`Traffic.payload` is what one device gives to the collective; `Traffic.sent` is what it sends when
the collective runs as a ring over n devices:

    all-reduce    2 (n - 1) ceil(payload / n)    in 2 (n - 1) messages
    all-gather    (n - 1) payload                in n - 1 messages

Heads are sharded over the tensor parallel devices, so the partial results that are merged have
H / tensor heads. The latent cache is replicated over them, so every one of them exchanges the whole
latents in prefill. One device alone exchanges nothing. Counts are of attention: the all-reduce of
an MLP and the exchange of experts come on top.

Dims: B batch, L new tokens of a sequence, S tokens of a prompt, D model width, H heads, C latent,
R rotated and V value width.
Source of the ring's counts: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, JPDC 2009.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla.checks import ShapeError
from mla.config import MLAConfig

PARTIAL = torch.float32  # of out and lse before they are merged


class Traffic(NamedTuple):
    """One collective as one device sees it."""

    payload: int  # bytes that the device gives
    sent: int  # bytes that it sends, with a ring
    messages: int  # one after the other, with a ring

    def seconds(self, bytes_per_second: float, latency: float = 0.0) -> float:
        """Time over links of this speed, in one direction; ``latency`` seconds for a message."""
        return self.sent / bytes_per_second + self.messages * latency


NOTHING = Traffic(0, 0, 0)


def ring_all_reduce(payload: int, num_devices: int) -> Traffic:
    """The sum of ``payload`` bytes of every device, on every device."""
    if num_devices == 1:
        return NOTHING
    messages = 2 * (num_devices - 1)
    return Traffic(payload, messages * -(-payload // num_devices), messages)


def ring_all_gather(payload: int, num_devices: int) -> Traffic:
    """``payload`` bytes of every device, on every device."""
    if num_devices == 1:
        return NOTHING
    return Traffic(payload, (num_devices - 1) * payload, num_devices - 1)


def heads_per_device(config: MLAConfig, tensor: int) -> int:
    """H / tensor.

    Raises:
        ShapeError: the heads do not divide.
    """
    _require_sizes("heads_per_device", tensor=tensor)
    if config.num_attention_heads % tensor:
        raise ShapeError(
            f"heads_per_device: tensor has value {tensor}, expected a divisor of "
            f"{config.num_attention_heads} heads"
        )
    return config.num_attention_heads // tensor


def tensor_parallel_bytes(
    config: MLAConfig,
    *,
    batch: int,
    tensor: int,
    new_tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """All-reduce of the output of one layer, ``[B, L, D]`` in ``dtype``.

    Args:
        config: of the layer.
        batch: B, at least 1.
        tensor: devices that share the heads.
        new_tokens: L, at least 1.
        dtype: of the layer's output.

    Raises:
        ShapeError: a size is below 1, or the heads do not divide.
    """
    _require_sizes("tensor_parallel_bytes", batch=batch, new_tokens=new_tokens)
    heads_per_device(config, tensor)
    return ring_all_reduce(batch * new_tokens * config.hidden_size * dtype.itemsize, tensor)


def context_parallel_decode_bytes(
    config: MLAConfig,
    *,
    batch: int,
    context: int,
    tensor: int = 1,
    new_tokens: int = 1,
    width: int | None = None,
) -> Traffic:
    """All-gather of the partial results of one layer: H / tensor heads, W + 1 float32 numbers each.

    Args:
        config: of the layer.
        batch: B, at least 1.
        context: devices that share the cached tokens.
        tensor: devices that share the heads.
        new_tokens: L, at least 1.
        width: W; None: V, what the layer sends.

    Raises:
        ShapeError: a size is below 1, or the heads do not divide.
    """
    width = config.v_head_dim if width is None else width
    sizes = {"batch": batch, "context": context, "new_tokens": new_tokens, "width": width}
    _require_sizes("context_parallel_decode_bytes", **sizes)
    numbers = heads_per_device(config, tensor) * (width + 1)
    return ring_all_gather(batch * new_tokens * numbers * PARTIAL.itemsize, context)


def context_parallel_prefill_bytes(
    config: MLAConfig,
    *,
    batch: int,
    num_tokens: int,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """Exchange of the latents and rotated keys of one layer, ``[B, S / context, C + R]``.

    Args:
        config: of the layer.
        batch: B, at least 1.
        num_tokens: S, at least 1; padded until each device has two chunks of one size.
        context: devices that share the prompt.
        dtype: of the latents, which are exchanged before they are coded.

    Raises:
        ShapeError: a size is below 1.
    """
    _require_sizes(
        "context_parallel_prefill_bytes", batch=batch, num_tokens=num_tokens, context=context
    )
    share = num_tokens if context == 1 else 2 * -(-num_tokens // (2 * context))
    return ring_all_gather(batch * share * config.cache_width * dtype.itemsize, context)


def _require_sizes(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(f"{op}: {name} has value {size!r}, expected an integer of at least 1")
