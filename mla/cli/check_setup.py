"""What `check` compares with: one layer, random inputs that no dtype rounds, and cache views.

Dims: B batch, S keys, C latent width, R rotated width, Z positions in one page, W row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mla import reference
from mla.codec import Codec
from mla.config import MLAConfig, RopeConfig
from mla.module import MultiheadLatentAttention
from mla.ops.select import Impl
from mla.view import CacheView

# Every convention shows: sizes that differ, YaRN with both corrections, both factors, biases.
SMALL = MLAConfig(
    hidden_size=40,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope=RopeConfig(
        scaling="yarn",
        factor=40.0,
        original_max_position_embeddings=24,
        mscale=1.0,
        mscale_all_dim=0.7,
        query_scale_beta=0.3,
    ),
    query_scale=1.25,
    latent_scale=1.5,
    attention_bias=True,
    query_bias=True,
)
LARGEST_D, LARGEST_Q = 256, 128  # no op sees D and Q, and float64 projections are slow


def config_of(preset: str | None) -> MLAConfig:
    """The layer to check: a preset with smaller D and Q, or `SMALL`."""
    if preset is None:
        return SMALL
    config = MLAConfig.preset(preset)
    Q = config.q_lora_rank
    return replace(
        config,
        hidden_size=min(config.hidden_size, LARGEST_D),
        q_lora_rank=None if Q is None else min(Q, LARGEST_Q),
    )


@dataclass(frozen=True)
class Setup:
    """The layer under test and where it runs."""

    config: MLAConfig
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    @property
    def wide(self) -> torch.dtype:
        """float32 for the 16-bit dtypes."""
        return torch.promote_types(self.dtype, torch.float32)

    def draw(self, *shape: int, salt: int, size: float = 1.0) -> Tensor:
        """Normal numbers of the dtype under test; ``salt`` tells tensors of one seed apart."""
        rng = torch.Generator().manual_seed(1000 * self.seed + salt)
        drawn = size * torch.randn(*shape, generator=rng, dtype=torch.float64)
        return drawn.to(self.device, self.dtype)

    def integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """State of the layer: matrices that keep the size of their input, norms around 1."""
        found = {}
        like = MultiheadLatentAttention(self.config, device="meta", dtype=self.dtype).state_dict()
        for salt, (name, weight) in enumerate(like.items()):
            if weight.ndim == 2:
                found[name] = self.draw(*weight.shape, salt=salt, size=weight.shape[1] ** -0.5)
            else:
                center = 1.0 if "norm" in name else 0.0
                found[name] = center + self.draw(*weight.shape, salt=salt, size=0.2)
        return found

    def layer(self, impl: Impl = "auto") -> MultiheadLatentAttention:
        """The layer with these weights."""
        layer = MultiheadLatentAttention(self.config, impl=impl, device="meta", dtype=self.dtype)
        layer.load_state_dict(self.weights, assign=True)
        return layer.eval()

    def rows(self, B: int, S: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, S, C]`` and rotated keys ``[B, S, R]``, the keys three times as large."""
        config = self.config
        latent = self.draw(B, S, config.kv_lora_rank, salt=101)
        return latent, self.draw(B, S, config.qk_rope_head_dim, salt=102, size=3.0)

    def queries(self, B: int, L: int) -> Tensor:
        """``[B, L, H, N+R]``."""
        config = self.config
        return self.draw(B, L, config.num_attention_heads, config.qk_head_dim, salt=103)

    def absorbed_queries(self, B: int, L: int) -> tuple[Tensor, Tensor]:
        """``[B, L, H, C]`` and ``[B, L, H, R]``."""
        config = self.config
        H = config.num_attention_heads
        q_latent = self.draw(B, L, H, config.kv_lora_rank, salt=104)
        return q_latent, self.draw(B, L, H, config.qk_rope_head_dim, salt=105)


def poison_(rows: Tensor) -> Tensor:
    """Fill storage with what breaks careless arithmetic: NaN, or 0xFF bytes for coded rows."""
    return rows.fill_(float("nan") if rows.is_floating_point() else 0xFF)


def make_view(
    setup: Setup,
    rows: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    *,
    codec: Codec,
    starts: Sequence[int] | None = None,
    page_size: int | None = None,
) -> CacheView:
    """Visible positions hold ``rows``, everything else poison; dense, or pages in reverse order."""
    coded = codec.encode(*rows)
    B, S, W = coded.shape
    C, R = setup.config.kv_lora_rank, setup.config.qk_rope_head_dim
    first = [0] * B if starts is None else starts
    starts_B = None if starts is None else setup.integers(starts)
    lengths_B = setup.integers(lengths)
    if page_size is None:
        stored = poison_(coded.new_empty(B, S + 3, W))
        for b in range(B):
            stored[b, first[b] : lengths[b]] = coded[b, first[b] : lengths[b]]
        return CacheView.dense(stored, lengths_B, C=C, R=R, codec=codec, starts=starts_B)
    num_columns = -(-S // page_size)
    stored = poison_(coded.new_empty(B * num_columns + 1, page_size, W))
    pages = [[(b + 1) * num_columns - m for m in range(num_columns)] for b in range(B)]
    for b in range(B):
        for position in range(first[b], lengths[b]):
            page = pages[b][position // page_size]
            stored[page, position % page_size] = coded[b, position]
    table = torch.tensor(pages, dtype=torch.int32, device=setup.device)
    return CacheView.paged(stored, table, lengths_B, C=C, R=R, codec=codec, starts=starts_B)


def read_bytes(
    setup: Setup, coded: Tensor, codec: Codec, *, low_first: bool = True, rotation: bool = True
) -> tuple[Tensor, Tensor]:
    """Coded rows ``[B, S, W]`` as the oracle reads them, float64 ``[B, S, C]`` and ``[B, S, R]``.

    Args:
        low_first: whether the even one of two 4-bit values is in the low nibble.
        rotation: whether to believe the codec about its rotation.
    """
    C, R = setup.config.kv_lora_rank, setup.config.qk_rope_head_dim
    kind, group, rope_bits, rotates = codec.spec.split("/")
    if kind == "int4" and not low_first:
        packed = coded[..., : -(-C // 2)]
        coded = torch.cat([(packed >> 4) | (packed << 4), coded[..., packed.shape[-1] :]], dim=-1)
    found = [
        reference.decode_row(
            bytes(row),
            *(kind, C, R),
            group=int(group),
            rope_bits=int(rope_bits),
            rotation=(rotates == "1") == rotation,
        )
        for row in coded.cpu().flatten(0, -2).tolist()
    ]
    shape = coded.shape[:-1]
    latent = torch.tensor([row[0] for row in found], dtype=torch.float64).reshape(*shape, C)
    return latent, torch.tensor([row[1] for row in found], dtype=torch.float64).reshape(*shape, R)
