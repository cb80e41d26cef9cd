"""Small pools, sequences in them, and rows that name the tokens they follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from helpers import randn
from test_cache import config
from torch import Tensor

from mla import PagedLatentCache
from mla.cache import PagedBatch
from mla.ops import mla_gather

C, R, Z = 5, 2, 4
SIZES = ((7, 2), (5, 0))  # C and R of the layers that histories are written to
WIDTH = 9  # numbers of the longest of their rows


def small(**options: Any) -> PagedLatentCache:
    defaults: dict[str, Any] = {"num_pages": 10, "page_size": Z, "dtype": torch.float32}
    return PagedLatentCache(config(C, R), **{**defaults, **options})


def append(batch: PagedBatch, counts: list[int], seed: int = 0, **options: Any) -> Tensor:
    """One step of every layer; the rows ``[B, L, C+R]`` that it wrote to each."""
    batch.reserve(counts, **options)
    rows = randn(batch.batch_size, max(counts), C + R, seed=seed)
    for layer in range(batch.num_layers):
        batch.append(layer, rows[..., :C], rows[..., C:])
    return rows


def filled(pool: PagedLatentCache, ids: list[int], **options: Any) -> int:
    """A sequence of these tokens."""
    sequence = pool.allocate(ids, **options)
    append(pool.batch([sequence]), [len(ids) - pool.length(sequence)], seed=len(ids))
    return sequence


def contents(pool: PagedLatentCache, sequence: int, layer: int = 0) -> Tensor:
    view = pool.batch([sequence]).view(layer)
    rows = mla_gather(view, 0, pool.length(sequence), dtype=torch.float32)
    return torch.cat(rows, dim=-1)[0]


@dataclass
class History:
    """What the model knows: one digest a position (None: lost in a step that failed)."""

    root: bytes
    digests: list[bytes | None] = field(default_factory=list)
    told: list[int] = field(default_factory=list)  # ids of the prompt behind the digests
    ids: list[int] = field(default_factory=list)  # of the positions before the first unknown one

    def copy(self) -> History:
        return History(self.root, list(self.digests), list(self.told), list(self.ids))

    def cut(self, length: int) -> None:
        """Roll back; what follows is another prompt."""
        del self.digests[length:], self.ids[length:]
        self.told = []

    def next(self, token: object) -> bytes:
        before = self.digests[-1] if self.digests else self.root
        return sha256(repr((before, token)).encode()).digest()


def values(digests: Sequence[bytes], layer: int) -> Tensor:
    """``[S, C+R]`` float32 rows of one layer."""
    C, R = SIZES[layer]
    numbers = [list(digest[layer * WIDTH : layer * WIDTH + C + R]) for digest in digests]
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, C + R)
