"""Small layers with drawn weights, for the tests of the module."""

from __future__ import annotations

from typing import Any

import torch
from helpers import randn
from torch import Tensor

from mla import MLAConfig, MultiheadLatentAttention

SMALL = MLAConfig(
    hidden_size=20,
    num_attention_heads=3,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
)


def make_layer(
    config: MLAConfig, seed: int, dtype: torch.dtype = torch.float64, **options: Any
) -> MultiheadLatentAttention:
    """A layer whose weights are large enough for a softmax that is not flat."""
    layer = MultiheadLatentAttention(config, dtype=dtype, **options)
    with torch.no_grad():
        for index, (name, weight) in enumerate(layer.named_parameters()):
            noise = randn(*weight.shape, seed=seed + index)
            if weight.ndim == 2:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(("norm" in name) + 0.2 * noise)
    return layer


def inputs(B: int, L: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(B, L, 20, seed=seed, dtype=dtype)
