"""The layer under any `Conventions`, put together from the functions of `mla.reference`.

Run in float64 it is the truth; run in the dtype under test it shows what plain PyTorch loses there.

Dims: B batch, L queries, S keys, D model width, H heads, C latent width, N unrotated width,
R rotated width, V value width, X parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from mla import reference
from mla.cli.check_conventions import Conventions
from mla.config import MLAConfig
from mla.reference import Attention


class Cut(NamedTuple):
    """W_UK and W_UV."""

    w_uk: Tensor  # [H, N, C]
    w_uv: Tensor  # [H, V, C]


class Oracle:
    """The reference of one layer.

    Args:
        config: sizes.
        conventions: how to compute.
        weights: state_dict of the layer.
        device, dtype: where and in what the computation runs.
    """

    def __init__(
        self,
        config: MLAConfig,
        conventions: Conventions,
        weights: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.conventions = config, conventions
        self.device, self.dtype = device, dtype
        self._weights = weights
        self._wide = torch.promote_types(dtype, torch.float32)

    def take(self, tensor: Tensor) -> Tensor:
        """A floating tensor in the oracle's dtype, any tensor on its device."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def weight(self, name: str) -> Tensor:
        return self.take(self._weights[name])

    # --- rope ---------------------------------------------------------------------------------

    def angles(self, positions: Tensor) -> Tensor:
        """``[.., R/2]`` for integers ``[..]``, at least in float32."""
        rules = self.conventions
        positions = positions.to(self.device)
        is_long = bool((positions >= rules.trained).any())
        frequencies = rules.inv_freq_long if is_long else rules.inv_freq
        inv_freq = torch.tensor(frequencies, dtype=self._wide, device=self.device)
        position = rearrange(positions + rules.first_position, "... -> ... 1").to(self._wide)
        return rules.direction * position * inv_freq

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        """``[.., R]`` turned by ``angles [.., R/2]`` and multiplied by the amplitude."""
        rules = self.conventions
        if rules.pairing == "none" or x.shape[-1] == 0:
            return x
        if rules.pairing == "interleaved to half":
            turned = reference.rotate(x.to(self._wide), angles, "interleaved")
            turned = rearrange(turned, "... (l two) -> ... (two l)", two=2)
        else:
            turned = reference.rotate(x.to(self._wide), angles, rules.pairing)
        return (turned * rules.amplitude).to(x.dtype)

    # --- projections --------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = einsum(x, self.weight(f"{name}.weight"), "... i, o i -> ... o")
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self._weights else y

    def normalise(self, x: Tensor, name: str, eps: float, kind: str) -> Tensor:
        if kind == "none":
            return x
        weight = self.weight(f"{name}.weight")
        if kind == "mean":
            x = x - x.mean(-1, keepdim=True)
        return reference.rms_norm(x, 1 + weight if kind == "one plus" else weight, eps)

    def latents(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Latent ``[B, L, C]`` and shared key ``[B, L, R]`` of ``hidden [B, L, D]``."""
        rules, C = self.conventions, self.config.kv_lora_rank
        kv_a = self.linear("kv_a_proj_with_mqa", self.take(hidden))
        latent, k_rope = kv_a[..., :C], kv_a[..., C:]
        eps = rules.latent_norm_eps
        if rules.norm == "row":
            size = torch.sqrt(kv_a.pow(2).mean(-1, keepdim=True) + eps)
            latent = latent / size * self.weight("kv_a_layernorm.weight")
        else:
            latent = self.normalise(latent, "kv_a_layernorm", eps, rules.norm)
        return latent * rules.latent_scale, self.rotate(k_rope, self.angles(positions))

    def queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """``[B, L, H, N+R]`` of ``hidden [B, L, D]``."""
        rules, config = self.conventions, self.config
        hidden = self.take(hidden)
        if config.q_lora_rank is None:
            flat = self.linear("q_proj", hidden)
        else:
            low = self.linear("q_a_proj", hidden)
            eps, kind = rules.query_norm_eps, rules.query_norm
            flat = self.linear("q_b_proj", self.normalise(low, "q_a_layernorm", eps, kind))
        query = rearrange(flat, "b l (h e) -> b l h e", h=config.num_attention_heads)
        query = query * rules.query_scale
        if rules.query_order == "rope nope":
            query = query.roll(-config.qk_rope_head_dim, dims=-1)
        q_nope, q_rope = self.split_query(query)
        angles = rearrange(self.angles(positions), "... l -> ... 1 l")
        query = torch.cat([q_nope, self.rotate(q_rope, angles)], dim=-1)
        if rules.query_scale_beta:
            turns = torch.floor(positions.to(self.device) / rules.trained)
            factor = 1 + rules.query_scale_beta * torch.log1p(turns.to(self._wide))
            query = query * rearrange(factor, "... -> ... 1 1").to(query.dtype)
        return query

    def split_query(self, query: Tensor) -> tuple[Tensor, Tensor]:
        N = self.config.qk_nope_head_dim
        return query[..., :N], query[..., N:]

    # --- kv_b_proj ----------------------------------------------------------------------------

    def cut(self) -> Cut:
        """W_UK and W_UV out of kv_b_proj."""
        H, N, V = (
            self.config.num_attention_heads,
            self.config.qk_nope_head_dim,
            self.config.v_head_dim,
        )
        weight = self.weight("kv_b_proj.weight")
        rows = self.conventions.kv_b_rows
        if rows == "all keys":
            keys, values = weight[: H * N], weight[H * N :]
            return Cut(keys.unflatten(0, (H, N)), values.unflatten(0, (H, V)))
        layout = "(d h) c -> h d c" if rows == "heads last" else "(h d) c -> h d c"
        by_head = rearrange(weight, layout, h=H)
        if rows == "values keys":
            return Cut(by_head[:, V:], by_head[:, :V])
        return Cut(by_head[:, :N], by_head[:, N:])

    def absorb(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """``q_latent [B, L, H, C]`` and ``q_rope [B, L, H, R]``."""
        q_nope, q_rope = self.split_query(query)
        return einsum(q_nope, self.cut().w_uk, "b l h n, h n c -> b l h c"), q_rope

    def values(self, out: Tensor) -> Tensor:
        """``[B, L, H, V]`` of mean latents ``[B, L, H, C]``."""
        return einsum(out, self.cut().w_uv, "b l h c, h v c -> b l h v")

    # --- attention ----------------------------------------------------------------------------

    def absorbed(
        self,
        query: tuple[Tensor, Tensor],
        rows: tuple[Tensor, Tensor],
        lengths: Tensor,
        *,
        scale: float,
        starts: Tensor | None = None,
        query_lengths: Tensor | None = None,
    ) -> Attention:
        """`mla.reference.absorbed_attention`; ``query`` and ``rows`` have two parts."""
        rules = self.conventions
        q_latent, q_rope = (self.take(x) for x in query)
        latent, k_rope = (self.take(x) for x in rows)
        lengths = lengths.to(self.device)
        L, H = q_latent.shape[1:3]
        count = torch.full_like(lengths, L) if query_lengths is None else query_lengths
        count = count.to(self.device)
        starts = None if starts is None or rules.sees_padding else starts.to(self.device)
        if not rules.scores_rope:
            q_rope = torch.zeros_like(q_rope)
        if rules.mask == "none":  # one query that sees all: the L of them become heads
            q_latent, q_rope = (rearrange(x, "b l h c -> b 1 (l h) c") for x in (q_latent, q_rope))
        # A query at position l instead of lengths - L + l is what query_lengths = lengths says.
        counts = {"bottom-right": count, "top-left": lengths, "none": None}
        out, lse = reference.absorbed_attention(
            *(q_latent, q_rope, latent, k_rope, lengths),
            scale=scale,
            starts=starts,
            query_lengths=counts[rules.mask],
        )
        if rules.mask == "none":
            out = rearrange(out, "b 1 (l h) c -> b l h c", h=H)
            lse = rearrange(lse, "b 1 (l h) -> b l h", h=H)
        absent = (torch.arange(L, device=self.device) >= count[:, None])[..., None]
        out = out.masked_fill(absent[..., None], 0.0)
        return Attention(out, lse.masked_fill(absent, float("-inf")) * rules.lse_unit)

    def expanded(
        self,
        query: Tensor,
        rows: tuple[Tensor, Tensor],
        lengths: Tensor,
        *,
        scale: float,
        starts: Tensor | None = None,
    ) -> Attention:
        """`mla.reference.expanded_attention` of ``query [B, L, H, N+R]``."""
        rules, config = self.conventions, self.config
        latent, k_rope = (self.take(x) for x in rows)
        query = self.take(query)
        if rules.query_order == "rope nope":
            query = query.roll(-config.qk_rope_head_dim, dims=-1)
        if not rules.scores_rope:
            q_nope, q_rope = self.split_query(query)
            query = torch.cat([q_nope, torch.zeros_like(q_rope)], dim=-1)
        lengths = lengths.to(self.device)
        starts = None if starts is None or rules.sees_padding else starts.to(self.device)
        result = reference.expanded_attention(
            *(query, latent, k_rope, torch.cat(self.cut(), dim=1).flatten(0, 1)),
            num_heads=config.num_attention_heads,
            value_dim=config.v_head_dim,
            scale=scale,
            causal=rules.mask != "none",
            key_starts=starts,
            key_lengths=lengths,
            query_lengths=lengths if rules.mask == "top-left" else None,
        )
        return Attention(result.out, result.lse * rules.lse_unit)

    def merge(self, parts: Sequence[Attention]) -> Attention:
        """Results over disjoint keys as one."""
        out = torch.stack([part.out for part in parts])
        lse = torch.stack([part.lse for part in parts])
        if self.conventions.merge == "mean":
            return Attention(out.mean(0), reference.merge_partials(out, lse).lse)
        if self.conventions.merge == "base 2":
            merged = reference.merge_partials(out, lse * math.log(2))
            return Attention(merged.out, merged.lse / math.log(2))
        return reference.merge_partials(out, lse)

    # --- the layer ----------------------------------------------------------------------------

    def layer(
        self,
        hidden: Tensor,
        *,
        chunks: Sequence[int],
        starts: Tensor | None = None,
        absorbs: bool = False,
    ) -> Tensor:
        """``[B, L, D]`` of whole sequences ``hidden [B, L, D]``, causal; absorbed or expanded.

        Args:
            hidden: input of the layer.
            chunks: sizes of the calls that the layer under test gets; they sum to L.
            starts: ``[B]`` first real token of each row.
            absorbs: the form.
        """
        B, L, _ = hidden.shape
        position = torch.arange(L, device=self.device).expand(B, L)
        if self.conventions.chunks_restart:
            within = [i for size in chunks for i in range(size)]
            position = torch.tensor(within, device=self.device).expand(B, L)
        if starts is not None:
            position = (position - starts.to(self.device)[:, None]).clamp(min=0)
        query, (latent, k_rope) = self.queries(hidden, position), self.latents(hidden, position)
        parts, end = [], 0
        for size in chunks:
            begin, end = end, end + size
            rows = latent[:, :end], k_rope[:, :end]
            parts.append(self._attend(query[:, begin:end], rows, end, starts, absorbs))
        return self.linear("o_proj", rearrange(torch.cat(parts, dim=1), "b l h v -> b l (h v)"))

    def _attend(
        self,
        query: Tensor,
        rows: tuple[Tensor, Tensor],
        length: int,
        starts: Tensor | None,
        absorbs: bool,
    ) -> Tensor:
        scale = self.conventions.scale
        lengths = torch.full((query.shape[0],), length, device=self.device)
        if not absorbs:
            return self.expanded(query, rows, lengths, scale=scale, starts=starts).out
        found = self.absorbed(self.absorb(query), rows, lengths, scale=scale, starts=starts)
        return self.values(found.out)
