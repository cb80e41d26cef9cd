"""What a conversion changes in bytes and arithmetic, from the sizes of both models.

Dims: D model width, H heads, G key-value heads, d head width, C latent width, R rotated width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla.config import MLAConfig
from mla.plan import (
    StepCost,
    absorbed_step,
    break_even_intensity,
    bytes_per_token,
    crossover,
    grouped_bytes_per_token,
    grouped_step,
)


def grouped_sizes(host: Any) -> tuple[int, int, int, int]:
    """D, H, G and d of a transformers config."""
    D, H, G = host.hidden_size, host.num_attention_heads, host.num_key_value_heads
    return D, H, G, getattr(host, "head_dim", None) or D // H


def cached_bytes(
    host: Any, configs: Sequence[MLAConfig], dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    """Bytes that all layers cache for one token, in 16 bits and as stored here."""
    _, _, G, d = grouped_sizes(host)
    found: dict[str, dict[str, int]] = {"original": {}, "converted": {}}
    for key, kind in (("bits16", torch.bfloat16), ("stored", dtype)):
        found["original"][key] = len(configs) * grouped_bytes_per_token(G, d, dtype=kind)
        found["converted"][key] = sum(bytes_per_token(config, dtype=kind) for config in configs)
    return found


def arithmetic(host: Any, configs: Sequence[MLAConfig], contexts: Sequence[int]) -> dict[str, Any]:
    """Multiply-adds of one decode step, mean of the layers, and where the two cross."""
    D, H, G, d = grouped_sizes(host)
    original = grouped_step(D, H, G, d)
    steps = [absorbed_step(config) for config in configs]
    converted = StepCost(
        round(sum(step.fixed for step in steps) / len(steps)),
        round(sum(step.per_key for step in steps) / len(steps)),
    )
    sizes = cached_bytes(host, configs, torch.bfloat16)
    per_layer = {name: size["bits16"] // len(configs) for name, size in sizes.items()}
    return {
        "per_cached_token": {"original": original.per_key, "converted": converted.per_key},
        "fixed": {"original": original.fixed, "converted": converted.fixed},
        "per_step": {
            str(context): {"original": original.at(context), "converted": converted.at(context)}
            for context in contexts
        },
        "crossover_tokens": crossover(converted, original),
        "break_even_per_byte": break_even_intensity(
            converted, per_layer["converted"], original, per_layer["original"]
        ),
    }


def crossover_text(found: dict[str, Any]) -> str:
    """Where absorbed decoding computes less than the original, in words."""
    per_key, tokens = found["per_cached_token"], found["crossover_tokens"]
    ratio = per_key["converted"] / per_key["original"]
    if tokens is None and ratio >= 1:
        where = "there is no crossover: at every context it computes more"
    elif tokens is None:
        where = "there is no crossover: at every context it computes less"
    else:
        side = "up to" if ratio >= 1 else "from"
        where = f"it computes less {side} {tokens:,.0f} cached tokens"
    text = (
        f"Absorbed decoding takes {per_key['converted']:,} multiply-adds for each cached token and "
        f"layer, the original {per_key['original']:,} ({ratio:.1f} x); {where}."
    )
    least = found["break_even_per_byte"]
    if least:
        text += (
            f" It reads less, so at long contexts it is the faster one where a machine can do more "
            f"than {least:.1f} multiply-adds in the time it reads one byte (16-bit cache)."
        )
    return text
