"""What the conversion reads from a grouped-query model of transformers.

Llama, Mistral and Qwen2 share one attention: q, k, v and o projections, half-split RoPE over the
whole head, full causal attention. Whatever differs from that is refused by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from mla.checks import UnsupportedError
from mla.convert import AttentionWeights

MODEL_TYPES = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


class HostAttention(NamedTuple):
    """Sizes and conventions that all attention layers of a model share."""

    hidden_size: int  # D
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # d
    inv_freq: Tensor  # [d/2]
    softmax_scale: float  # the amplitude of a stretched RoPE, squared, included

    @property
    def shape(self) -> dict[str, Any]:
        """Keyword arguments of `gqa_to_mla` that are the same for all layers."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "inv_freq": self.inv_freq,
            "softmax_scale": self.softmax_scale,
        }


def read_host(model: Any, op: str = "convert_model") -> HostAttention:
    """The attention of ``model``, a causal language model of transformers.

    Raises:
        UnsupportedError: it is not a model whose attention can be converted; the message says why.
    """
    check_host_config(getattr(model, "config", None), op)
    config = model.config
    attention = decoder_layers(model)[0].self_attn
    for name in PROJECTIONS.values():
        if not isinstance(getattr(attention, name, None), nn.Linear):
            found = type(getattr(attention, name, None)).__name__
            raise UnsupportedError(
                f"{op}: {name} of model has type {found}, expected Linear of an unconverted model; "
                "merge adapters and dequantise weights first"
            )
    rotary = model.base_model.rotary_emb
    return HostAttention(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        inv_freq=rotary.inv_freq.detach(),
        softmax_scale=attention.scaling * rotary.attention_scaling**2,
    )


def check_host_config(config: Any, op: str) -> None:
    """Refuse a config of transformers whose attention is not the plain one."""
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"{op}: model has model_type {model_type!r}, expected one of {list(MODEL_TYPES)}"
            + ("; normed queries and keys cannot be mixed" if "qwen3" in str(model_type) else "")
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(
            f"{op}: rope_type has value {rope_type!r}, expected one of {list(ROPE_TYPES)}"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"{op}: partial_rotary_factor has value "
            f"{config.rope_parameters['partial_rotary_factor']}, expected 1"
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    # Mistral has no layer types: its window, if there is one, is that of every layer.
    has_window = model_type == "mistral" and config.sliding_window is not None
    if has_window or layer_types != {"full_attention"}:
        raise UnsupportedError(
            f"{op}: sliding_window has value {config.sliding_window}, expected None: a latent "
            "cache keeps every token"
        )


def decoder_layers(model: Any) -> Any:
    """The blocks of the decoder, each with its ``self_attn``."""
    return model.base_model.layers


def attention_weights(attention: Any) -> AttentionWeights:
    """The projections of one attention layer, as they are."""
    tensors: dict[str, Tensor] = {}
    for field, name in PROJECTIONS.items():
        projection = getattr(attention, name)
        tensors[field] = projection.weight.detach()
        if projection.bias is not None:
            tensors[f"{field}_bias"] = projection.bias.detach()
    return AttentionWeights(**tensors)
