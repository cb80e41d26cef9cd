"""A converted layer under the calling convention of transformers' MLA layers.

Dims: B batch, L new tokens, T cached tokens, D model width, H heads, C latent width, N unrotated,
R rotated and V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from mla.config import MLAConfig
from mla.module import MultiheadLatentAttention


class ConvertedAttention(nn.Module):
    """What stands where a decoder's grouped-query attention was.

    It has the seam of transformers' own MLA layers (latents go to the cache, ``expand_kv``, the
    attention interface), so `mla.integrations.transformers.replace_attention` makes it decode
    absorbed, and without that it still works, expanding the whole cache at each step.

    Args:
        host_config: of the model around it; names the attention implementation.
        config: of the layer.
        layer_idx: which layer of the cache.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, host_config: Any, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = host_config, layer_idx
        self.mla = MultiheadLatentAttention(config, layer_idx=layer_idx)
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.v_head_dim = config.v_head_dim
        self.scaling = config.scale
        self.attention_dropout = getattr(host_config, "attention_dropout", 0.0)

    @property
    def kv_b_proj(self) -> nn.Module:
        """Whatever stands there now, adapters included."""
        return self.mla.kv_b_proj

    def expand_kv(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[B, H, T, N+R]`` and values ``[B, H, T, V]`` of what is cached."""
        expanded = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1, -1)], dim=-1), value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``[B, L, D]``; ``position_embeddings`` are the host's, not this layer's."""
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
            position_ids = past + torch.arange(hidden_states.shape[1], device=hidden_states.device)
        query, latent, k_rope = self.mla.project(hidden_states, position_ids)
        query, latent, k_rope = query.transpose(1, 2), latent[:, None], k_rope[:, None]
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        key, value = self.expand_kv(latent, k_rope)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.mla.o_proj(out.flatten(2)), weights
