"""What a step costs, from its sizes alone.

Dims: L new queries, T keys they attend to (their own included), C latent width, N unrotated and
V value width of a head.
"""

from __future__ import annotations

from typing import Protocol


class LatentSizes(Protocol):
    """What the rule reads of an `mla.config.MLAConfig`."""

    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...


def should_absorb(num_queries: int, num_keys: int, config: LatentSizes) -> bool:
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
