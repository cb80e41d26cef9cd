"""A small language model over bytes whose blocks take one of three attentions.

    bytes [B, L] -> embedding -> num_layers x (attention, MLP) -> norm -> logits [B, L, 256]

    mha    keys and values of all heads             2 * H * d numbers cached per token and layer
    gqa    keys and values of fewer heads           2 * KV * d
    mla    one latent and one rotated key           C + R

`MultiheadLatentAttention` stands where the usual attention stands: the block does not know which
one it has. The MLP takes what the attention leaves of the block's parameters, so that the models
have the same size.

Dims: B batch, L new tokens, S cached positions, D width, H heads, KV key heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mla import DenseLatentCache, MLAConfig, MultiheadLatentAttention, RopeConfig
from mla.rope import cos_sin, rotate

VOCAB = 256
ROPE = RopeConfig(pairing="half")
Attention = Literal["mha", "gqa", "mla"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; `kv_lora_rank` and `rope_dim` are those of mla."""

    attention: Attention
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2  # of gqa
    head_dim: int = 32
    kv_lora_rank: int = 48
    rope_dim: int = 16

    @property
    def latent(self) -> MLAConfig:
        return MLAConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.head_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=self.head_dim,
            rope=ROPE,
        )

    @property
    def products_per_cached_token(self) -> int:
        """Multiplications of one layer for each cached token when it decodes one more."""
        if self.attention == "mla":
            return self.num_heads * (2 * self.kv_lora_rank + self.rope_dim)
        return self.num_heads * 2 * self.head_dim


class KeyValueCache:
    """Keys and values of all layers in buffers of a fixed length, used as `DenseLatentCache` is."""

    def __init__(
        self, num_layers: int, batch_size: int, num_heads: int, max_length: int, head_dim: int
    ) -> None:
        shape = (num_layers, batch_size, num_heads, max_length, head_dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.length = 0

    def reserve(self, num_tokens: int) -> None:
        self.length += num_tokens

    def append(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[B, KV, L, d]`` into the reserved positions; all of them so far."""
        new = slice(self.length - keys.shape[2], self.length)
        self.keys[layer_idx, :, :, new] = keys
        self.values[layer_idx, :, :, new] = values
        used = slice(0, self.length)
        return self.keys[layer_idx, :, :, used], self.values[layer_idx, :, :, used]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


Cache = KeyValueCache | DenseLatentCache


class GroupedAttention(nn.Module):
    """Causal attention with KV key heads; multi-head attention where KV is H."""

    def __init__(self, config: ModelConfig, num_kv_heads: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_kv_heads, self.head_dim = layer_idx, num_kv_heads, config.head_dim
        D, width = config.hidden_size, config.num_heads * config.head_dim
        self.q_proj = nn.Linear(D, width, bias=False)
        self.k_proj = nn.Linear(D, num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(D, num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        L = x.shape[1]
        first = 0 if cache is None else cache.length - L
        query, keys, values = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = cos_sin(ROPE, self.head_dim, torch.arange(first, first + L), dtype=x.dtype)
        query, keys = rotate(query, cos, sin, "half"), rotate(keys, cos, sin, "half")
        if cache is not None:
            keys, values = cache.append(self.layer_idx, keys, values)
        if L == 1:  # the heads of a group are the query rows of its one key head: nothing to repeat
            grouped = query.unflatten(1, (self.num_kv_heads, -1)).squeeze(3)
            out = F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2).unsqueeze(2)
        else:
            assert first == 0, "several tokens at once go into an empty cache only"
            repeats = query.shape[1] // self.num_kv_heads
            out = F.scaled_dot_product_attention(
                query,
                keys.repeat_interleave(repeats, dim=1),
                values.repeat_interleave(repeats, dim=1),
                is_causal=True,
            )
        output: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return output


def attention_layer(config: ModelConfig, layer_idx: int) -> nn.Module:
    """The one place where the three models differ."""
    if config.attention == "mla":
        return MultiheadLatentAttention(config.latent, layer_idx=layer_idx)
    num_kv_heads = config.num_heads if config.attention == "mha" else config.num_kv_heads
    return GroupedAttention(config, num_kv_heads, layer_idx)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.attention_norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attention = attention_layer(config, layer_idx)
        used = sum(parameter.numel() for parameter in self.attention.parameters())
        width = (12 * D * D - used) // (2 * D)  # 12 D^2: the block of a common transformer
        self.mlp = nn.Sequential(
            nn.Linear(D, width, bias=False), nn.GELU(), nn.Linear(width, D, bias=False)
        )

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache=cache)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class TinyModel(nn.Module):
    """The language model; the embedding is also the output matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, idx) for idx in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits ``[B, L, 256]`` of the next bytes after ``tokens [B, L]``."""
        if cache is not None:
            cache.reserve(tokens.shape[1])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return F.linear(self.norm(x), self.embedding.weight)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        config = self.config
        if config.attention == "mla":
            return DenseLatentCache(
                config.latent,
                batch_size=batch_size,
                max_length=max_length,
                num_layers=config.num_layers,
            )
        num_heads = config.num_heads if config.attention == "mha" else config.num_kv_heads
        return KeyValueCache(config.num_layers, batch_size, num_heads, max_length, config.head_dim)


@torch.no_grad()
def generate(
    model: TinyModel, prompt: Tensor, num_tokens: int, *, temperature: float = 0.8, seed: int = 0
) -> Tensor:
    """``prompt [L]`` continued by ``num_tokens`` sampled bytes, one cached step each."""
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, len(prompt) + num_tokens)
    tokens, logits = prompt, model(prompt[None], cache)
    for _ in range(num_tokens):
        chances = torch.softmax(logits[0, -1] / temperature, dim=-1)
        token = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat([tokens, token])
        logits = model(token[None], cache)
    return tokens
