"""The plain alternative: the grouped-query cache of an unconverted model, quantised.

Every token's keys (after RoPE) and values are rounded in groups of one token and head:

    8 bits          x ~ scale * q              q in -127 .. 127        one 16-bit number a group
    below 8 bits    x ~ low + scale * q        q in 0 .. 2^bits - 1    two 16-bit numbers a group

As in `coded_rows`, each row is rounded before anything attends to it, which is what a decoding
step finds in the cache. A conversion that loses more than this at equal bytes is not worth having.

Dims: B batch, G key-value heads, T tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla.checks import UnsupportedError
from mla.integrations.converted.hosts import decoder_layers, read_host

SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class GroupedCodec:
    """Integers of ``bits`` bits in groups of ``group`` numbers of a head; None: the whole head."""

    bits: int = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UnsupportedError(f"GroupedCodec: bits has value {self.bits}, expected 2 to 8")
        if self.group is not None and self.group < 1:
            raise UnsupportedError(f"GroupedCodec: group has value {self.group}, expected >= 1")

    @property
    def spec(self) -> str:
        return f"int{self.bits}" + ("" if self.group is None else f"/{self.group}")

    def bytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one layer for one token, scales included, integers packed without gaps."""
        numbers_a_group = 1 if self.bits == 8 else 2
        groups = 2 * num_kv_heads * self._groups(head_dim)
        integers = -(-2 * num_kv_heads * head_dim * self.bits // 8)
        return integers + groups * numbers_a_group * SCALE_BYTES

    def through(self, rows: Tensor) -> Tensor:
        """``[.., d]`` as they come back from the cache, same dtype."""
        grouped = rows.float().unflatten(-1, (self._groups(rows.shape[-1]), -1))
        return self._rounded(grouped).flatten(-2).to(rows.dtype)

    def _rounded(self, grouped: Tensor) -> Tensor:
        if self.bits == 8:
            scale = _stored(grouped.abs().amax(-1, keepdim=True) / 127)
            return scale * (grouped / _safe(scale)).round().clamp(-127, 127)
        largest = 2**self.bits - 1
        low = _stored(grouped.amin(-1, keepdim=True))
        scale = _stored((grouped.amax(-1, keepdim=True) - low) / largest)
        return low + scale * ((grouped - low) / _safe(scale)).round().clamp(0, largest)

    def _groups(self, head_dim: int) -> int:
        group = self.group or head_dim
        if head_dim % group:
            raise UnsupportedError(
                f"GroupedCodec: group has value {group}, expected a divisor of head_dim {head_dim}"
            )
        return head_dim // group


def _stored(values: Tensor) -> Tensor:
    """As float16 numbers; what it cannot hold saturates."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half().float()


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@contextmanager
def quantised_rows(model: Any, codec: GroupedCodec) -> Iterator[None]:
    """Within the block every layer of ``model`` attends to keys and values as ``codec`` keeps them.

    Nothing of the model is changed afterwards. For `mla.convert.token_losses`, without a cache.

    Args:
        model: an unconverted causal language model of transformers, as for `convert_model`.
        codec: of the cache that is to be judged.

    Raises:
        UnsupportedError: the model is of another kind, or is called with a cache of its own.
    """
    read_host(model, "quantised_rows")
    rows = _Rows(codec)

    def attend_to_rows(
        attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("past_key_values") is not None:
            raise UnsupportedError(
                "quantised_rows: past_key_values has a cache, expected None; call with "
                "use_cache=False"
            )
        return args, {**kwargs, "past_key_values": rows}

    handles = [
        layer.self_attn.register_forward_pre_hook(attend_to_rows, with_kwargs=True)
        for layer in decoder_layers(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rows:
    """What attention takes for a cache: it gives back what it was given, rounded."""

    def __init__(self, codec: GroupedCodec) -> None:
        self.codec = codec

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """``[B, G, T, d]`` each, keys rotated already."""
        return self.codec.through(key), self.codec.through(value)
