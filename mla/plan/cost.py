"""What a step costs, from its sizes alone: bytes cached, multiply-adds, and where two forms cross.

Dims: D model width, H heads, G key-value heads, L new queries, T keys they attend to (their own
included), Q query latent, C key-value latent, N unrotated, R rotated and V value width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla.codec import Codec, PlainCodec
from mla.config import MLAConfig


class StepCost(NamedTuple):
    """Multiply-adds of one attention layer for one new token: ``fixed + per_key * T``."""

    fixed: int
    per_key: int

    def at(self, num_keys: int) -> int:
        """Multiply-adds with ``num_keys`` tokens to attend to."""
        return self.fixed + self.per_key * num_keys


def should_absorb(num_queries: int, num_keys: int, config: MLAConfig) -> bool:
    """Whether absorbed attention takes fewer multiplications than expanding the keys.

        L < T*C*d / (C*d + T*(2*C - d))    with d = N + V

    Expanding costs T*C*d a head once, absorbing 2*C - d more for each pair of query and key, and
    C*d for each query. A cold prefill (T == L) always expands. For long contexts that is L < 170
    with DeepSeek-V3's sizes and L < 85 with MiniCPM3's.

    Args:
        num_queries: L, new tokens of one row.
        num_keys: T, cached tokens after the new ones were appended.
        config: of the layer.
    """
    L, T, C = num_queries, num_keys, config.kv_lora_rank
    d = config.qk_nope_head_dim + config.v_head_dim
    return L < T and L * (C * d + T * (2 * C - d)) < T * C * d


def bytes_per_token(
    config: MLAConfig, codec: Codec | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes that one layer caches for one token.

    Args:
        config: of the layer.
        codec: how a row is stored; None: C + R plain values.
        dtype: of plain values.
    """
    codec = codec or PlainCodec()
    width = codec.row_width(config.kv_lora_rank, config.qk_rope_head_dim)
    return width * codec.storage_dtype(dtype).itemsize


def grouped_bytes_per_token(
    num_kv_heads: int, head_dim: int, *, dtype: torch.dtype = torch.bfloat16
) -> int:
    """The same for grouped-query attention: a key and a value for each key-value head."""
    return 2 * num_kv_heads * head_dim * dtype.itemsize


def absorbed_step(config: MLAConfig) -> StepCost:
    """One decode step of the layer in the absorbed form, projections included.

    per_key = H * (2*C + R)      scores over C + R numbers, sums over C
    """
    D, H, Q, C = (
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.kv_lora_rank,
    )
    N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query = D * H * (N + R) if Q is None else D * Q + Q * H * (N + R)
    fixed = query + D * (C + R) + H * C * (N + V) + H * V * D
    return StepCost(fixed, H * (2 * C + R))


def grouped_step(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> StepCost:
    """One decode step of a layer of grouped-query attention, projections included.

    per_key = H * 2 * d      scores over d numbers, sums over d
    """
    fixed = 2 * hidden_size * head_dim * (num_heads + num_kv_heads)
    return StepCost(fixed, num_heads * 2 * head_dim)


def crossover(one: StepCost, other: StepCost) -> float | None:
    """Number of keys at which the two cost the same, or None where one is always cheaper."""
    if one.per_key == other.per_key:
        return None
    keys = (other.fixed - one.fixed) / (one.per_key - other.per_key)
    return keys if keys > 0 else None


def break_even_intensity(
    one: StepCost, one_bytes: int, other: StepCost, other_bytes: int
) -> float | None:
    """Multiply-adds per byte read above which a machine runs ``one`` faster than ``other``.

    For long contexts the time of a cached token is the larger of its bytes over the bandwidth and
    its multiply-adds over the speed of the arithmetic. ``one`` reads less and computes more: it
    wins where its arithmetic takes less time than the other's reading.

    Args:
        one, other: costs of the two forms; only ``per_key`` counts.
        one_bytes, other_bytes: bytes cached for one token.

    Returns:
        The intensity; 0 where ``one`` needs no more arithmetic; None where it does not read less.
    """
    if one_bytes >= other_bytes:
        return None
    return 0.0 if one.per_key <= other.per_key else one.per_key / other_bytes


def sequences_that_fit(memory: float, num_tokens: int, token_bytes: float) -> int:
    """How many sequences of ``num_tokens`` a cache of ``memory`` bytes holds, whole ones.

    Args:
        memory: bytes that the cache may take.
        num_tokens: of one sequence, at least 1.
        token_bytes: cached for one token in all layers, see `bytes_per_token`.

    Raises:
        ValueError: a number is out of range.
    """
    _require_positive("sequences_that_fit", num_tokens=num_tokens, token_bytes=token_bytes)
    if memory < 0:
        raise ValueError(f"sequences_that_fit: memory has value {memory}, expected at least 0")
    return int(memory // (num_tokens * token_bytes))


def cost_per_million_tokens(tokens_per_second: float, price_per_hour: float) -> float:
    """Money for a million tokens, in the unit of the price.

        price / 3600 / tokens per second * 10^6

    Args:
        tokens_per_second: of everything that the price pays for together.
        price_per_hour: at least 0.

    Raises:
        ValueError: a number is out of range.
    """
    _require_positive("cost_per_million_tokens", tokens_per_second=tokens_per_second)
    if not 0 <= price_per_hour < float("inf"):
        raise ValueError(
            f"cost_per_million_tokens: price_per_hour has value {price_per_hour}, "
            "expected a number of at least 0"
        )
    return price_per_hour / 3600 / tokens_per_second * 1e6


def _require_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{op}: {name} has value {value}, expected above 0")
