"""What the implementations of prefill share: sizes, masking, gradients.

Dims: B batch, H heads, N unrotated width, R rotated width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    H: int
    N: int
    R: int
    V: int


class Masking(NamedTuple):
    """Which keys are visible; the arguments of `mla.ops.mla_prefill`."""

    causal: bool
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_q: int | None = None  # host bounds of the packed lengths; None: the number of tokens
    max_k: int | None = None


class Gradients(NamedTuple):
    query: Tensor
    latent: Tensor
    k_rope: Tensor
    kv_b_weight: Tensor


def sizes_of(query: Tensor, k_rope: Tensor, kv_b_weight: Tensor) -> Sizes:
    H, width = query.shape[-2:]
    R = k_rope.shape[-1]
    N = width - R
    return Sizes(H, N, R, kv_b_weight.shape[0] // max(H, 1) - N)
