"""Tiny converted models and their originals, for the tests of healing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cli_models import tiny_llama
from hf_models import draw_weights_, tokens
from torch import Tensor, nn

# Of `HealOptions`: enough to change a tiny model within a few steps.
FAST: dict[str, Any] = {
    "learning_rate": 4e-3,
    "match_rate": 4e-3,
    "match_steps": 4,
    "warmup": 2,
    "held_out": 2,
}
# Random tokens have nothing in common to learn, so the held-out windows are among the others.
WINDOWS = tokens(6, 24, seed=1)[[0, 1, 2, 3, 4, 5, 0, 1]]


def tiny_qwen2() -> nn.Module:
    """Biases on queries, keys and values; untied head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    draw_weights_(model, 3)
    return model


def converted_pair(
    make: Callable[[], Any] = tiny_llama, *, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """The original model, and its conversion at two fifths of the cache."""
    from mla.integrations.converted import convert_model

    original = make().to(dtype)
    return original, convert_model(original, WINDOWS, kv_budget=0.4)


def attention_weights(model: nn.Module) -> list[Tensor]:
    """Copies of all that healing trains."""
    return [x.detach().clone() for name, x in model.named_parameters() if ".self_attn." in name]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
