"""One long row of storage for each sequence of a batch.

Dims: B batch, Z capacity of a row in positions, W stored row width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mla.cache.base import CacheFull, LatentCache
from mla.checks import ShapeError
from mla.codec import Codec
from mla.config import MLAConfig
from mla.view import CacheView

# Copies amortise to 2-3 for each appended row; at most a third of the storage is unused.
GROWTH = 1.5
ROUND_TO = 64


class DenseLatentCache(LatentCache):
    """A cache of ``[B, Z, W]`` rows in each layer.

    Without ``max_length`` the storage grows by half when it is full, so that appending costs the
    same however long the cache is. With it the storage is fixed, its address never changes and
    `reserve` raises `CacheFull` beyond it: the form for CUDA graphs and compiled steps.

    Args:
        config: of all layers, or a sequence with one for each layer.
        batch_size: B, number of rows.
        max_length: capacity in positions, or None to grow.
        num_layers: when one config serves all layers.
        codec: how rows are stored; None: plain values.
        device, dtype: of the rows (dtype for the plain codec only); None: PyTorch's defaults.

    Raises:
        ShapeError: a size is not positive.
    """

    def __init__(
        self,
        config: MLAConfig | Sequence[MLAConfig],
        *,
        batch_size: int,
        max_length: int | None = None,
        num_layers: int = 1,
        codec: Codec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            config,
            batch_size=batch_size,
            num_layers=num_layers,
            codec=codec,
            device=device,
            dtype=dtype,
        )
        if max_length is not None and max_length < 1:
            raise ShapeError(
                f"DenseLatentCache: max_length has value {max_length}, expected at least 1 or None"
            )
        self._is_fixed = max_length is not None
        self._rows = [self._allocate(layer, max_length or 0) for layer in range(self.num_layers)]

    @property
    def capacity(self) -> int:
        """Positions that every layer has storage for."""
        return min(rows.shape[1] for rows in self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, all layers together."""
        return sum(rows.nbytes for rows in self._rows)

    def view(self, layer_idx: int) -> CacheView:
        """What the ops read; stale once the cache has grown."""
        self._check_layer("DenseLatentCache.view", layer_idx)
        config, rows = self.configs[layer_idx], self._rows[layer_idx]
        return CacheView(
            rows=rows,
            page_table=None,
            lengths=self.lengths,
            starts=self.starts,
            C=config.kv_lora_rank,
            R=config.qk_rope_head_dim,
            codec=self.codec,
            max_length=rows.shape[1] if self._is_fixed else self.max_length,
        )

    def reorder(self, indices: Sequence[int]) -> None:
        """Row b becomes a copy of the former row ``indices[b]``, as beam search needs.

        Raises:
            ShapeError: not B indices of rows; nothing has changed.
        """
        indices = list(indices)
        B = self.batch_size
        if len(indices) != B or not all(0 <= index < B for index in indices):
            raise ShapeError(
                f"DenseLatentCache.reorder: indices has value {indices}, "
                f"expected {B} numbers of 0 to {B - 1}"
            )
        order = torch.tensor(indices, device=self.device)
        for rows in self._rows:
            used = rows[:, : self.max_length]
            used.copy_(used[order])
        self._set_lengths([self._host_lengths[index] for index in indices])
        self._set_starts([self._host_starts[index] for index in indices])

    def _make_room(self, lengths: list[int]) -> None:
        needed = max(lengths)
        if needed <= self.capacity:
            return
        if self._is_fixed:
            raise CacheFull(
                f"DenseLatentCache: max_length has value {self.capacity}, "
                f"expected at least {needed} for the new tokens; nothing was appended"
            )
        grown = max(needed, int(GROWTH * self.capacity))
        grown = -(-grown // ROUND_TO) * ROUND_TO
        for layer, old in enumerate(self._rows):
            if old.shape[1] < grown:
                new = self._allocate(layer, grown)
                new[:, : self.max_length] = old[:, : self.max_length]
                self._rows[layer] = new

    def _allocate(self, layer: int, capacity: int) -> Tensor:
        config = self.configs[layer]
        width = self.codec.row_width(config.kv_lora_rank, config.qk_rope_head_dim)
        dtype = self.codec.storage_dtype(self.dtype)
        return torch.empty(self.batch_size, capacity, width, dtype=dtype, device=self.device)
