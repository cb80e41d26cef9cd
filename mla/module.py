"""MultiheadLatentAttention: the layer, for training, prefill and decode.

    queries [B, L, H, N+R]   latent [B, L, C]   k_rope [B, L, R]
    fresh tokens only, or many on a short cache -> expanded attention   (mla_prefill)
    few tokens on a longer cache                -> absorbed attention   (mla_decode)

Dims: B batch, L new tokens, S keys, T packed tokens, D model width, H heads, Q query latent,
C key-value latent, N unrotated width, R rotated width, V value width.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mla.absorb import (
    absorb_output,
    absorb_queries,
    effective_weight,
    expansion,
    local_part,
    split_kv_b,
)
from mla.cache import LatentCache
from mla.checks import ShapeError, UnsupportedError, bind_dims
from mla.config import MLAConfig
from mla.ops import mla_decode, mla_gather, mla_prefill
from mla.ops.prefill import Save, check_boundaries
from mla.ops.select import Impl, preferred
from mla.padding import Runs, default_positions, runs_of
from mla.plan import should_absorb
from mla.rope import cos_sin, query_position_scale, rotate
from mla.view import CacheView


class Angles(NamedTuple):
    """Of the rotary embedding, times its amplitude: ``[B, L, R/2]`` or ``[L, R/2]`` each."""

    cos: Tensor
    sin: Tensor


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, with its weight in the dtype of the input: autocast mixes the two."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class MultiheadLatentAttention(nn.Module):
    """Multi-head latent attention under the checkpoint names of the DeepSeek models.

    A state_dict of a transformers MLA layer loads with ``strict=True``. The softmax, causal mask,
    rotary embedding and cache are inside; residual, outer norm and dropout of the block are not.
    Weights may be created on the meta device; there are no buffers.

    Args:
        config: sizes and conventions.
        layer_idx: which layer of the cache this one writes.
        impl: who computes the ops, see `mla.ops.supported_impls`; an op that this implementation
            does not have takes ``"auto"``.
        save: what training keeps for the backward pass, see `mla.ops.mla_prefill`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        layer_idx: int = 0,
        impl: Impl = "auto",
        save: Save = "latent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.impl, self.save = config, layer_idx, impl, save
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        Q, bias, query_bias = config.q_lora_rank, config.attention_bias, config.query_bias

        def linear(inputs: int, outputs: int, has_bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=has_bias, device=device, dtype=dtype)

        def norm(width: int, eps: float) -> nn.RMSNorm:
            return RMSNorm(width, eps=eps, device=device, dtype=dtype)

        if Q is None:
            self.q_proj = linear(D, H * (N + R), query_bias)
        else:
            self.q_a_proj = linear(D, Q, bias)
            self.q_a_layernorm = norm(Q, config.query_norm_eps)
            self.q_b_proj = linear(Q, H * (N + R), query_bias)
        self.kv_a_proj_with_mqa = linear(D, C + R, bias)
        if config.latent_norm == "rms":
            self.kv_a_layernorm = norm(C, config.latent_norm_eps)
        self.kv_b_proj = linear(C, H * (N + V), False)
        self.o_proj = linear(H * V, D, bias)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"H={c.num_attention_heads}, C={c.kv_lora_rank}, N={c.qk_nope_head_dim}, "
            f"R={c.qk_rope_head_dim}, V={c.v_head_dim}, layer_idx={self.layer_idx}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        positions: Tensor | None = None,
        cache: LatentCache | None = None,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Causal attention over the new tokens and what the cache holds.

        With a cache, its layer ``layer_idx`` is appended to in place; without a reservation for
        this step the layer makes one. Gradients flow through the new tokens, not into the cache.

        Args:
            hidden_states: ``[B, L, D]``; packed sequences: ``[1, T, D]``.
            positions: ``[B, L]`` or ``[L]`` integers for the rotary embedding; None: counted from
                the first real token of each row, behind the cached ones.
            cache: filled by earlier calls; None attends among the new tokens only.
            attn_mask: ``[B, S]`` bool, True for real tokens, one run a row (left or right
                padding); S = L, or cached + L. Left padding is for an empty cache.
            cu_seqlens: ``[sequences + 1]`` int32 boundaries of packed sequences, from 0 to T.

        Returns:
            ``[B, L, D]``, dtype of the projections; padded positions hold finite values without
            meaning.

        Raises:
            ShapeError: a size, dtype or device does not fit; the cache is unchanged.
            UnsupportedError: the combination is not implemented.
            CacheFull: no room for the new tokens; the cache is unchanged.
        """
        self._check(hidden_states, positions, cache, cu_seqlens)
        B, L, _ = hidden_states.shape
        runs = (
            None
            if attn_mask is None
            else runs_of("MultiheadLatentAttention", attn_mask, B, L, cache)
        )
        if cache is not None:
            self._reserve(cache, runs, L)
        if positions is None:
            positions = default_positions(hidden_states, cache, runs, cu_seqlens)
        kv_a = self.kv_a_proj_with_mqa(hidden_states)
        angles = self._angles(positions, kv_a.dtype)
        query = self._queries(hidden_states, positions, angles)
        if cache is None:
            latent, k_rope = self._latents(kv_a, angles)
            starts = None if runs is None else runs.starts
            values = self._expanded(query, latent, k_rope, starts, None, cu_seqlens)
        else:
            values = self._cached(query, kv_a, angles, cache)
        output: Tensor = self.o_proj(values.flatten(2))
        return output

    def queries(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries ``[B, L, H, N+R]`` of ``hidden_states [B, L, D]``."""
        return self._queries(hidden_states, positions, None)

    def latents(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What is cached: latent ``[B, L, C]`` after norm and scale, rotated key ``[B, L, R]``."""
        kv_a = self.kv_a_proj_with_mqa(hidden_states)
        return self._latents(kv_a, self._angles(positions, kv_a.dtype))

    def project(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`queries` and `latents` together, which takes one table of angles instead of two."""
        kv_a = self.kv_a_proj_with_mqa(hidden_states)
        angles = self._angles(positions, kv_a.dtype)
        return self._queries(hidden_states, positions, angles), *self._latents(kv_a, angles)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> Angles | None:
        R, rope = self.config.qk_rope_head_dim, self.config.rope
        if R == 0 or rope.pairing == "none":
            return None
        return Angles(*cos_sin(rope, R, positions, dtype=dtype))

    def _queries(self, hidden_states: Tensor, positions: Tensor, angles: Angles | None) -> Tensor:
        config = self.config
        if config.q_lora_rank is None:
            flat = self.q_proj(hidden_states)
        else:
            flat = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query: Tensor = flat.unflatten(-1, (-1, config.qk_head_dim))  # H, or the heads of a shard
        if config.query_scale != 1.0:
            query = query * config.query_scale
        if angles is None:
            angles = self._angles(positions, query.dtype)
        if angles is not None:
            q_nope, q_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
            cos, sin = (x.unsqueeze(-2) for x in angles)
            query = torch.cat([q_nope, rotate(q_rope, cos, sin, config.rope.pairing)], dim=-1)
        by_position = query_position_scale(config.rope, positions, dtype=query.dtype)
        return query if by_position is None else query * by_position[..., None, None]

    def _latents(self, kv_a: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
        config = self.config
        latent, k_rope = kv_a.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        if config.latent_norm == "rms":
            latent = self.kv_a_layernorm(latent)
        if config.latent_scale != 1.0:
            latent = latent * config.latent_scale
        if angles is not None:
            k_rope = rotate(k_rope, *angles, config.rope.pairing)
        return latent, k_rope

    def _expanded(
        self,
        query: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        key_starts: Tensor | None,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Values ``[B, L, H, V]`` by expanded attention."""
        packed = cu_seqlens is not None
        weight, latent = (x.to(query.dtype) for x in expansion(self.kv_b_proj, latent))
        k_rope = k_rope.to(query.dtype)
        self._check_rows(weight, query)
        result = mla_prefill(
            query[0] if packed else query,
            latent[0] if packed else latent,
            k_rope[0] if packed else k_rope,
            weight,
            scale=self.config.scale,
            key_starts=key_starts,
            key_lengths=key_lengths,
            cu_seqlens_q=cu_seqlens,
            save=self.save,
            impl=preferred(self.impl, "mla_prefill"),
        )
        return result.out[None] if packed else result.out

    def _cached(
        self, query: Tensor, kv_a: Tensor, angles: Angles | None, cache: LatentCache
    ) -> Tensor:
        """Append, then attend in the cheaper form."""
        view, latent, k_rope = self._append(kv_a, angles, cache)
        if cache.is_cold:
            return self._expanded(query, latent, k_rope, cache.starts, None)
        new_lengths = cache.new_lengths(query.shape[1])
        is_padded = new_lengths is not None
        if is_padded or should_absorb(query.shape[1], view.max_length, self.config):
            return self._absorbed(query, view, new_lengths)
        past = mla_gather(view, 0, view.max_length, dtype=query.dtype)
        position = (view.lengths - query.shape[1]).long()[:, None] + torch.arange(
            query.shape[1], device=query.device
        )
        row = torch.arange(query.shape[0], device=query.device)[:, None]
        # The chunk sees its own latents as they are, the earlier ones as they are stored.
        keys = past.latent.index_put((row, position), latent.to(query.dtype))
        ropes = past.k_rope.index_put((row, position), k_rope.to(query.dtype))
        return self._expanded(query, keys, ropes, view.starts, view.lengths)

    def _append(
        self, kv_a: Tensor, angles: Angles | None, cache: LatentCache
    ) -> tuple[CacheView, Tensor, Tensor]:
        """The view with the new rows, and the new rows ``[B, L, C]`` and ``[B, L, R]``."""
        config = self.config
        norm = self.kv_a_layernorm if config.latent_norm == "rms" else None
        is_own_norm = norm is None or type(norm) is RMSNorm
        if (torch.is_grad_enabled() and kv_a.requires_grad) or not is_own_norm:
            latent, k_rope = self._latents(kv_a, angles)
            return cache.append(self.layer_idx, latent, k_rope), latent, k_rope
        shape = (*kv_a.shape[:2], -1)
        cos, sin = (kv_a, kv_a) if angles is None else (x.expand(shape) for x in angles)
        return cache.append_projected(
            self.layer_idx,
            kv_a,
            None if norm is None else local_part(norm.weight).to(kv_a.dtype),
            cos,
            sin,
            eps=config.latent_norm_eps,
            latent_scale=config.latent_scale,
            pairing="none" if angles is None else config.rope.pairing,
            impl=preferred(self.impl, "mla_append"),
        )

    def _absorbed(self, query: Tensor, view: CacheView, query_lengths: Tensor | None) -> Tensor:
        """Values ``[B, L, H, V]`` by absorbed attention."""
        q_latent, q_rope, w_uv = self._absorb(query)
        result = mla_decode(
            q_latent,
            q_rope,
            view,
            scale=self.config.scale,
            query_lengths=query_lengths,
            impl=preferred(self.impl, "mla_decode"),
        )
        return absorb_output(result.out, w_uv)

    def _absorb(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, L, H, C]`` and ``[B, L, H, R]``, and W_UV ``[H, V, C]`` for the output."""
        config = self.config
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        q_nope, q_rope = query.split([N, R], dim=-1)
        weight = effective_weight(self.kv_b_proj).to(query.dtype)
        w_uk, w_uv = split_kv_b(weight, query.shape[2], N, V)
        return absorb_queries(q_nope, w_uk), q_rope, w_uv

    def _check_rows(self, weight: Tensor, query: Tensor) -> None:
        """Engines that shard parameters may have gathered those of the queries alone."""
        H, width = query.shape[2], self.config.qk_nope_head_dim + self.config.v_head_dim
        if weight.shape[0] != H * width:
            raise ShapeError(
                f"MultiheadLatentAttention: kv_b_proj has {weight.shape[0]} rows here, expected "
                f"H*(N+V)={H * width} for the H={H} heads of the queries; shard heads with "
                "mla.parallel.shard_heads, and parameters layer by layer"
            )

    def _check(
        self,
        hidden_states: Tensor,
        positions: Tensor | None,
        cache: LatentCache | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        name = "MultiheadLatentAttention"
        sizes = {"D": self.config.hidden_size}
        bind_dims(name, "hidden_states", hidden_states, "B L D", sizes)
        if positions is not None:
            bind_dims(name, "positions", positions, "B L"[2 * (positions.ndim == 1) :], sizes)
            if positions.is_floating_point():
                raise ShapeError(
                    f"{name}: positions has dtype {positions.dtype}, expected integers"
                )
        if self.training and self.config.attention_dropout > 0:
            raise UnsupportedError(
                f"{name}: attention_dropout has value {self.config.attention_dropout}, expected 0 "
                "in training; dropout of attention weights is not implemented"
            )
        if cu_seqlens is not None:
            if cache is not None or sizes["B"] != 1:
                raise UnsupportedError(
                    f"{name}: cu_seqlens has a value with batch {sizes['B']}"
                    f"{'' if cache is None else ' and a cache'}, expected [1, T, D] and no cache"
                )
            check_boundaries(name, "cu_seqlens", cu_seqlens, sizes["L"])
        if cache is None:
            return
        if cache.batch_size != sizes["B"] or self.layer_idx >= cache.num_layers:
            raise ShapeError(
                f"{name}: cache has {cache.batch_size} rows and {cache.num_layers} layers, "
                f"expected B={sizes['B']} rows and more than layer_idx={self.layer_idx} layers"
            )
        held = cache.configs[self.layer_idx]
        if (held.kv_lora_rank, held.qk_rope_head_dim) != self._row_sizes:
            raise ShapeError(
                f"{name}: cache has C={held.kv_lora_rank}, R={held.qk_rope_head_dim} in layer "
                f"{self.layer_idx}, expected C={self._row_sizes[0]}, R={self._row_sizes[1]}"
            )

    @property
    def _row_sizes(self) -> tuple[int, int]:
        return self.config.kv_lora_rank, self.config.qk_rope_head_dim

    def _reserve(self, cache: LatentCache, runs: Runs | None, L: int) -> None:
        if runs is None or torch.compiler.is_compiling():
            cache.ensure_reserved(self.layer_idx, L, starts=None)
        elif cache.max_length == 0:
            starts = runs.starts.tolist()
            cache.ensure_reserved(self.layer_idx, runs.ends.tolist(), starts=starts)
        else:
            cache.ensure_reserved(self.layer_idx, runs.ends.tolist(), starts=None)
