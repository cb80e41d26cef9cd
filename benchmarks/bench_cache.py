"""Appending one token to the cache of one layer, and the memory the cache really holds.

`DenseLatentCache` grows by half when it is full: the candidate appends token by token from S to
1.5 S, one whole cycle with its copy, and the time is per token. transformers' `DynamicCache` copies
everything for every token; a few tokens show it. Memory is the size of the storage behind the
tensors, at its worst during the same appends, over what the rows themselves need.

Dims: S cached positions, C=512, R=64, batch 1, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Point
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import DenseLatentCache, MLAConfig
from mla.cache.dense import GROWTH

C, R = 512, 64
CONFIG = MLAConfig(
    hidden_size=2048,
    num_attention_heads=16,
    kv_lora_rank=C,
    qk_nope_head_dim=128,
    qk_rope_head_dim=R,
    v_head_dim=128,
)
IMPLS = ("transformers DynamicCache", "mla DenseLatentCache")
NUM_COPIED = 16  # tokens that are enough for a cache whose every append costs the same


def points(quick: bool) -> list[Point]:
    return [{"S": S} for S in ((1024, 4096, 16384) if quick else (1024, 2048, 4096, 8192, 16384))]


class Ours:
    def __init__(self, S: int) -> None:
        self.cache = DenseLatentCache(CONFIG, batch_size=1)
        self.append(S)

    def append(self, num_tokens: int) -> None:
        self.cache.reserve(num_tokens)
        self.cache.append(0, *_tokens(num_tokens))

    def stored(self) -> Iterable[Tensor]:
        return [self.cache.view(0).rows]


class Stock:
    def __init__(self, S: int) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.append(S)

    def append(self, num_tokens: int) -> None:
        latent, k_rope = _tokens(num_tokens)
        self.cache.update(latent[:, None], k_rope[:, None], 0)

    def stored(self) -> Iterable[Tensor]:
        layer = self.cache.layers[0]
        return [layer.keys, layer.values]


def _tokens(num_tokens: int) -> tuple[Tensor, Tensor]:
    return torch.ones(1, num_tokens, C), torch.ones(1, num_tokens, R)


def _start(S: int, impl: str) -> tuple[Ours | Stock, int]:
    """A cache of S tokens and how many are to be appended one by one."""
    return (Ours(S), S // 2) if impl == IMPLS[1] else (Stock(S), NUM_COPIED)


def setup(point: Point, impl: str) -> Candidate:
    S = int(point["S"])
    held: list[Ours | Stock] = []
    units = _start(S, impl)[1]

    def before() -> None:
        held[:] = [_start(S, impl)[0]]

    def run() -> None:
        for _ in range(units):
            held[0].append(1)

    return Candidate(run=run, before=before, after=held.clear, units=units)


def memory(S: int, impl: str) -> tuple[float, float]:
    """Largest ratio of storage to rows during the appends, and mebibytes at their end."""
    cache, units = _start(S, impl)
    worst = 0.0
    for position in range(S + 1, S + units + 1):
        cache.append(1)
        held = sum(tensor.untyped_storage().nbytes() for tensor in cache.stored())
        worst = max(worst, held / (position * (C + R) * 4))
    return worst, held / 2**20


COMPARISON = Comparison(impls=IMPLS, setup=setup)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    rows: list[Row] = []
    for row in COMPARISON.rows_at(point, options, on_round):
        worst, mebibytes = memory(int(point["S"]), str(row["impl"]))
        limit = GROWTH if row["impl"] == IMPLS[1] else None
        rows.append({**row, "MiB": mebibytes, "worst_held/needed": worst, "limit": limit})
    return rows


BENCHMARK = Benchmark(
    name="cache",
    title="Appending one token to S cached ones (times per token), and the memory held",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
