"""The layer under context parallelism, applied to a finished module from outside.

    shard_context(model, mesh["cp"])        # after shard_heads(model, mesh["tp"]), where both

    no cache, or an empty one   hidden_states are this rank's tokens (`shard_sequence`), zigzag
    a cache that holds tokens   hidden_states are all new tokens, the same on all ranks

A step into an empty cache is a prefill: the latents of all ranks come together, each rank writes
those of its own pages and attends with its own queries. Later steps append and decode: every rank
computes the same projections, attends to its own pages, and merges.

Dims: B batch, L tokens of this rank, S of all ranks, H heads, C latent width, R rotated width.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from mla.absorb import expansion
from mla.cache import LatentCache
from mla.checks import ShapeError, UnsupportedError
from mla.module import Angles, MultiheadLatentAttention
from mla.ops.select import preferred
from mla.padding import Runs
from mla.parallel.context import attend_shard, context_decode, gather_rows
from mla.parallel.sequence import Group, process_group, shard_of, zigzag_positions
from mla.view import CacheView

M = TypeVar("M", bound=nn.Module)


class _ContextParallel(MultiheadLatentAttention):
    """Methods that replace those of a layer; `shard_context` puts them before its class."""

    _context_group: dist.ProcessGroup

    def forward(
        self,
        hidden_states: Tensor,
        *,
        positions: Tensor | None = None,
        cache: LatentCache | None = None,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """As `MultiheadLatentAttention.forward`, see the head of this file.

        Args:
            hidden_states: ``[B, L, D]`` this rank's tokens, or all of them once the cache holds
                any.
            positions: of ``hidden_states``; None: counted, zigzag where tokens are cut.
            cache: a batch of a `mla.PagedLatentCache` with ``shard=shard_of(group)``. Where rows
                are padded on the right, reserve their lengths before the first layer.

        Raises:
            UnsupportedError: ``attn_mask`` or ``cu_seqlens``.
        """
        for name, value in (("attn_mask", attn_mask), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise UnsupportedError(
                    f"MultiheadLatentAttention: {name} has a value under context parallelism, "
                    "expected None; pad on the right and reserve the lengths of the rows"
                )
        shard = shard_of(self._context_group)
        self._check(hidden_states, positions, cache, None)
        if cache is not None:
            held = cache.view(self.layer_idx).shard
            if held != shard:
                raise ShapeError(
                    f"MultiheadLatentAttention: cache has shard {held}, expected {shard}, (rank, "
                    "size) of the group; build it with shard=shard_of(group)"
                )
            self._reserve(cache, None, hidden_states.shape[1])
        if positions is None and (cache is None or cache.is_cold):
            length = hidden_states.shape[1] * shard[1]
            positions = zigzag_positions(length, shard, device=hidden_states.device)
        return super().forward(hidden_states, positions=positions, cache=cache)

    def _reserve(self, cache: LatentCache, runs: Runs | None, L: int) -> None:
        is_empty = cache.max_length == 0
        count = shard_of(self._context_group)[1] if is_empty else 1
        cache.ensure_reserved(self.layer_idx, L * count, starts=None)

    def _cached(
        self, query: Tensor, kv_a: Tensor, angles: Angles | None, cache: LatentCache
    ) -> Tensor:
        if cache.is_cold:
            return self._prefill(query, *self._latents(kv_a, angles), cache)
        view, _, _ = self._append(kv_a, angles, cache)
        return self._absorbed(query, view, cache.new_lengths(query.shape[1]))

    def _expanded(
        self,
        query: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        key_starts: Tensor | None,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        return self._prefill(query, latent, k_rope, None)

    def _prefill(
        self, query: Tensor, latent: Tensor, k_rope: Tensor, cache: LatentCache | None
    ) -> Tensor:
        """Values ``[B, L, H, V]`` from ``latent [B, L, C]`` of this rank's tokens."""
        weight, latent = expansion(self.kv_b_proj, latent)
        latent, k_rope = gather_rows(latent, k_rope, self._context_group)
        if cache is not None:
            cache.append(self.layer_idx, latent, k_rope)
        self._check_rows(weight, query)
        result = attend_shard(
            query,
            *(x.to(query.dtype) for x in (latent, k_rope, weight)),
            shard=shard_of(self._context_group),
            scale=self.config.scale,
            save=self.save,
            impl=preferred(self.impl, "mla_prefill"),
        )
        return result.out

    def _absorbed(self, query: Tensor, view: CacheView, query_lengths: Tensor | None) -> Tensor:
        q_latent, q_rope, w_uv = self._absorb(query)
        result = context_decode(
            q_latent,
            q_rope,
            view,
            scale=self.config.scale,
            group=self._context_group,
            w_uv=w_uv,
            query_lengths=query_lengths,
            impl=preferred(self.impl, "mla_decode"),
        )
        return result.out


def shard_context(module: M, group: Group) -> M:
    """Cut the context of every MLA layer in ``module`` over the ranks of ``group``, in place.

    Weights and their names stay as they are, and each rank has all of them. Applied twice, the
    last group holds. With heads sharded too, apply `mla.parallel.shard_heads` first.

    Args:
        module: a `MultiheadLatentAttention`, or a model with some inside.
        group: of the ranks that share a context; a mesh with one dim, such as ``mesh["cp"]``.

    Returns:
        ``module``.

    Raises:
        ShapeError: the mesh has several dims.
        UnsupportedError: ``module`` has no such layer; nothing has changed.
    """
    members = process_group(group)
    layers = [part for part in module.modules() if isinstance(part, MultiheadLatentAttention)]
    if not layers:
        raise UnsupportedError(
            f"shard_context: module has type {type(module).__name__} without an MLA layer, "
            "expected a MultiheadLatentAttention or a model with some inside"
        )
    for layer in layers:
        kind = type(layer)
        if not issubclass(kind, _ContextParallel):
            layer.__class__ = type(f"ContextParallel{kind.__name__}", (_ContextParallel, kind), {})
        cast(_ContextParallel, layer)._context_group = members
    return module
