"""Operands of prefill as its kernels take them: tokens without a batch dim, groups of heads.

Dims: B batch, L queries, S keys, T query tokens, T' key tokens, H heads, h heads of one group,
C latent width, N unrotated width, R rotated width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.kernels import launch
from mla.kernels.launch_prefill import Kernel, PrefillRow, prefill_row
from mla.kernels.prefill_tiles import parts
from mla.kernels.prefill_types import Masking, Sizes, sizes_of

# Elements of expanded keys and values, with their gradients, that may be alive at once: 256 MiB in
# bfloat16. The forward result does not depend on it.
MAX_EXPANDED = 1 << 27


class Operands(NamedTuple):
    """Operands without a batch dim: a padded batch is a pack of sequences with equal room."""

    query: Tensor  # [T, H, N+R], last dim contiguous
    latent: Tensor  # [T', C]
    k_rope: Tensor  # [T', R]
    weight: Tensor  # [H, N+V, C]
    sizes: Sizes
    L: int
    S: int
    num_sequences: int
    masking: Masking

    def row(self, kernel: Kernel) -> PrefillRow:
        _, N, R, V = self.sizes
        columns = sum(sum(parts(width)) for width in (N, R, V))
        architecture = launch.architecture(self.query.device)
        return prefill_row(architecture, kernel, columns, self.query.dtype)

    def num_tiles(self, kernel: Kernel, row: PrefillRow) -> int:
        """Tiles of the longest sequence, of keys or of queries."""
        most, bound, size = self.L, self.masking.max_q, row.BLOCK_L
        if kernel == "keys":
            most, bound, size = self.S, self.masking.max_k, row.BLOCK_S
        return -(-(most if bound is None else min(most, bound)) // size)

    def launch(self, kernel: Any, name: Kernel, heads: slice, kv: Tensor, **others: Any) -> None:
        """Run one of the three attention kernels, whose further arguments have the same names."""
        row = self.row(name)
        num_tiles = self.num_tiles(name, row)
        num_heads = heads.stop - heads.start
        # One dim, because the others of a grid are limited to 65535.
        grid = (self.num_sequences * num_heads * num_tiles,)
        if grid[0] == 0:
            return
        H, N, R, V = self.sizes
        launch.run(
            kernel,
            grid,
            self.query.device,
            **others,
            q_ptr=self.query,
            kv_ptr=kv,
            rope_ptr=self.k_rope,
            starts_ptr=self.masking.key_starts,
            lengths_ptr=self.masking.key_lengths,
            cu_q_ptr=self.masking.cu_seqlens_q,
            cu_k_ptr=self.masking.cu_seqlens_k,
            L=self.L,
            S=self.S,
            H=H,
            first_head=heads.start,
            num_heads=num_heads,
            num_tiles=num_tiles,
            q_stride=self.query.stride(0),
            q_head_stride=self.query.stride(1),
            kv_stride=kv.stride(0),
            rope_stride=self.k_rope.stride(0),
            N=N,
            R=R,
            V=V,
            CAUSAL=self.masking.causal,
            BLOCK_L=row.BLOCK_L,
            BLOCK_S=row.BLOCK_S,
            UPCAST=launch.upcast(self.query),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )

    def head_groups(self, *, copies: int = 1) -> Iterator[slice]:
        """Slices of heads of about equal size whose expanded rows fit into `MAX_EXPANDED`."""
        H, N, R, V = self.sizes
        columns = N + V if copies == 1 else copies * (N + V) + 2 * R  # float32 rope gradients
        most = max(1, MAX_EXPANDED // max(1, self.latent.shape[0] * columns))
        size = -(-H // -(-H // most))
        for first in range(0, H, size):
            yield slice(first, min(first + size, H))

    def seen_tokens(self) -> Tensor | None:
        """Key tokens that some query may see, ``[T']`` bool; None: all of them."""
        _, starts, lengths, cu_q, cu_k = self.masking[:5]
        token = torch.arange(self.S, device=self.query.device)
        if cu_q is not None and cu_k is not None:
            sequence = torch.searchsorted(cu_k, token, right=True, out_int32=True) - 1
            is_inside = (sequence >= 0) & (sequence < self.num_sequences)
            has_query = cu_q.diff() > 0
            return is_inside & has_query[sequence.clamp(0, self.num_sequences - 1)]
        if starts is None and lengths is None:
            return None
        seen = token.new_ones(self.num_sequences, self.S, dtype=torch.bool)
        if starts is not None:
            seen &= token >= starts[:, None]
        if lengths is not None:
            seen &= token < lengths[:, None]
        return seen.flatten()


def flatten(
    query: Tensor, latent: Tensor, k_rope: Tensor, kv_b_weight: Tensor, masking: Masking
) -> Operands:
    """Operands without their batch dim; what is contiguous is not copied."""
    sizes = sizes_of(query, k_rope, kv_b_weight)
    B, L = query.shape[:2]
    cu_seqlens_q = masking.cu_seqlens_q
    return Operands(
        _rows(query.flatten(0, 1)),
        _rows(latent.flatten(0, 1)),
        _rows(k_rope.flatten(0, 1)),
        _rows(kv_b_weight).unflatten(0, (sizes.H, sizes.N + sizes.V)),
        sizes,
        L,
        latent.shape[1],
        B if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        masking._replace(
            key_starts=_dense(masking.key_starts),
            key_lengths=_dense(masking.key_lengths),
            cu_seqlens_q=_dense(masking.cu_seqlens_q),
            cu_seqlens_k=_dense(masking.cu_seqlens_k),
        ),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dim contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
