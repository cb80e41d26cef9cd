"""Tiny random models of transformers with MLA layers, for the tests of everything that meets them.

Sizes differ from each other and are no powers of two where the model allows it; weights are large
enough that greedy continuations wander through the vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 64
EOS, PAD = 1, 0

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 128,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "dense", "dense"],
}
_INDEXER: dict[str, Any] = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
# What a model needs beyond SIZES; a value of None removes the size.
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_parameters": YARN, "topk_method": "greedy", "n_group": 1},
    "deepseek_v3": {"rope_parameters": YARN},
    "minicpm3": {"dim_model_base": 20, "scale_emb": 1.5, "tie_word_embeddings": False},
    "youtu": {"tie_word_embeddings": False},
    "glm4_moe_lite": {},
    "mistral4": {
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3, "partial_rotary_factor": 0.4}
    },
    "longcat_flash": {
        "num_layers": 1,
        "num_hidden_layers": None,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "head_dim": 8,
    },
    "axk1": {"rope_parameters": YARN},
    "dots3_note_text": {
        "use_dsa": False,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 4,
        "head_dim": 20,
        "swa_num_attention_heads": 5,
        "swa_num_key_value_heads": 5,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 28,
        "swa_head_dim": 22,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 10,
    },
    "kimi_linear": _LINEAR | {"linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": _LINEAR | {"head_dim": 8, "num_mtp_layers": 0},
    "deepseek_v32": _INDEXER,
    "glm_moe_dsa": _INDEXER,
    "axk2": _INDEXER,
    "hy_v4": _INDEXER,
}
STANDARD = (
    "deepseek_v2",
    "deepseek_v3",
    "minicpm3",
    "youtu",
    "glm4_moe_lite",
    "mistral4",
    "longcat_flash",
    "axk1",
)
# MLA beside linear or sliding attention; newer than the oldest transformers that is tested.
HYBRID = ("kimi_linear", "bailing_hybrid", "dots3_note_text")
SPARSE = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4")  # an indexer selects the keys


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of about 20k parameters; skips the test where transformers lacks the model."""
    transformers = pytest.importorskip("transformers")
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    values = SIZES | EXTRA.get(model_type, {}) | overrides
    values = {key: copy.deepcopy(value) for key, value in values.items() if value is not None}
    return CONFIG_MAPPING[model_type](**values)


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any
) -> nn.Module:
    """The causal language model of ``model_type`` in eval mode, weights drawn from ``seed``."""
    return model_from_config(tiny_config(model_type, **overrides), seed=seed, dtype=dtype)


def model_from_config(
    config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """Like `tiny_model`, from a config object that stays the model's own."""
    import transformers

    name = type(config).__name__.removesuffix("Config").removesuffix("Text")
    causal = getattr(transformers, f"{name}ForCausalLM")
    # Stock eager attention gives NaN for padded rows in float64; hy_v4 has no other.
    attention = "sdpa" if getattr(causal, "_supports_sdpa", False) else "eager"
    model = causal._from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    model = model.to(dtype).eval()
    draw_weights_(model, seed)
    model.generation_config.eos_token_id = None  # compare full-length continuations
    model.generation_config.pad_token_id = PAD
    return model


@torch.no_grad()
def draw_weights_(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter: matrices so that activations keep their size, norms around 1."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if parameter.ndim < 2:
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.2 * noise)
        elif "embed" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random ids without the padding id."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=rng)


def left_padded(lengths: list[int], *, seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of rows of the given lengths, padded on the left."""
    width = max(lengths)
    ids = tokens(len(lengths), width, seed=seed)
    column = torch.arange(width)
    mask = (column >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def attention(model: nn.Module, layer: int = 0) -> Any:
    """The attention module of a layer."""
    return model.model.layers[layer].self_attn


@torch.no_grad()
def logits(model: nn.Module, **options: Any) -> Tensor:
    """Logits of a forward pass, by default over two rows of six tokens."""
    return model(**{"input_ids": tokens(2, 6), "use_cache": False} | options).logits


def assert_equal_logits(model: nn.Module, other: nn.Module, **options: Any) -> None:
    """The same logits up to rounding in float64."""
    torch.testing.assert_close(
        # Float64: sums in another order; the text has no other loss.
        logits(model, **options),
        logits(other, **options),
        rtol=1e-9,
        atol=1e-9,
    )
