"""Cost of one more token in the cache of one layer, and the memory the cache really holds.

append  time per appended token. `DenseLatentCache` grows by half when it is full: the candidate
        appends token by token from S to 1.5 S, one whole cycle with its copy. `PagedLatentCache`
        takes a page now and then. transformers' `DynamicCache` copies everything for every token;
        a few tokens show it.
decode  time per cached token of one absorbed decode step over S of them. The pages of the pool lie
        between those of another sequence.

Both are flat where a token costs the same however long the cache is. Memory is the size of the
storage behind the tensors (of the pool: of the pages in use), at its worst during the same appends,
over what the rows themselves need.

Dims: S cached positions, C=512, R=64, H=16, batch 1, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import device, placed
from benchmarks.harness import Candidate, Point
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import DenseLatentCache, MLAConfig, PagedLatentCache
from mla.cache import LatentCache
from mla.cache.dense import GROWTH
from mla.ops import mla_decode

DEVICE = device()
C, R, H = 512, 64, 16
CONFIG = MLAConfig(
    hidden_size=2048,
    num_attention_heads=H,
    kv_lora_rank=C,
    qk_nope_head_dim=128,
    qk_rope_head_dim=R,
    v_head_dim=128,
)
STOCK, DENSE, PAGED = "transformers DynamicCache", "mla DenseLatentCache", "mla PagedLatentCache"
ROW_BYTES = 4 * (C + R)
PAGE_SIZE = 64
NUM_COPIED = 16  # tokens that are enough for a cache whose every append costs the same


def points(quick: bool) -> list[Point]:
    """Every S that both operations are measured at."""
    sizes = (1024, 8192, 65536) if quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    return [{"op": op, "S": S} for op in ("append", "decode") for S in sizes]


class Ours:
    """A cache of ours; ``held`` is what its rows occupy."""

    def __init__(self, S: int, cache: LatentCache) -> None:
        self.cache = cache
        self.append(S)

    def append(self, num_tokens: int) -> None:
        self.cache.reserve(num_tokens)
        self.cache.append(0, *_tokens(num_tokens))

    def held(self) -> int:
        return self.cache.view(0).rows.untyped_storage().nbytes()


class Dense(Ours):
    def __init__(self, S: int) -> None:
        super().__init__(S, DenseLatentCache(CONFIG, batch_size=1, device=DEVICE))


class Paged(Ours):
    """One of two sequences, whose pages alternate."""

    def __init__(self, S: int) -> None:
        num_pages = 2 * (3 * S // (2 * PAGE_SIZE) + 2)
        self.pool = PagedLatentCache(
            CONFIG, num_pages=num_pages, page_size=PAGE_SIZE, device=DEVICE
        )
        self.sequence, other = self.pool.allocate(), self.pool.allocate()
        both = self.pool.batch([other, self.sequence])
        for _ in range(S // PAGE_SIZE - 1):
            both.reserve(PAGE_SIZE)
        super().__init__(PAGE_SIZE, self.pool.batch([self.sequence]))
        self.pool.rows(0)[:] = 1.0  # what the reservations left unwritten

    def held(self) -> int:
        page_bytes = self.pool.nbytes // self.pool.num_pages
        return -(-self.pool.length(self.sequence) // PAGE_SIZE) * page_bytes


class Stock:
    def __init__(self, S: int) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.append(S)

    def append(self, num_tokens: int) -> None:
        latent, k_rope = _tokens(num_tokens)
        self.cache.update(latent[:, None], k_rope[:, None], 0)

    def held(self) -> int:
        layer = self.cache.layers[0]
        return sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))


KINDS: dict[str, Callable[[int], Dense | Paged | Stock]] = {
    STOCK: Stock,
    DENSE: Dense,
    PAGED: Paged,
}
# Appends cost the pool the same at all times, but for the page of every 64th.
NUM_APPENDED: dict[str, Callable[[int], int]] = {
    STOCK: lambda S: NUM_COPIED,
    DENSE: lambda S: S // 2,
    PAGED: lambda S: min(S // 2, 32 * PAGE_SIZE),
}


def _tokens(num_tokens: int) -> tuple[Tensor, Tensor]:
    shapes = ((1, num_tokens, C), (1, num_tokens, R))
    latent, k_rope = (torch.ones(shape, device=DEVICE) for shape in shapes)
    return latent, k_rope


def setup(point: Point, impl: str) -> Candidate:
    """Appends of one token each."""
    S = int(point["S"])
    units = NUM_APPENDED[impl](S)
    held: list[Dense | Paged | Stock] = []

    def before() -> None:
        held[:] = [KINDS[impl](S)]

    def run() -> None:
        for _ in range(units):
            held[0].append(1)

    return Candidate(run=run, before=before, after=held.clear, units=units)


def setup_decode(point: Point, impl: str) -> Candidate:
    """One decode step; the time is per cached token."""
    S = int(point["S"])
    cache = (Dense if impl == DENSE else Paged)(S)
    view = cache.cache.view(0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(S, C + R, generator=generator).to(DEVICE)
    if view.page_table is None:
        view.rows[0, :S] = rows
    else:
        pages = view.page_table[0, : S // PAGE_SIZE].long()
        view.rows[pages] = rows.unflatten(0, (-1, PAGE_SIZE))
    query = torch.randn(1, 1, H, C + R, generator=generator).to(DEVICE)

    def run() -> Tensor:
        return mla_decode(query[..., :C], query[..., C:], view, scale=CONFIG.scale).out

    return Candidate(run=run, num_bytes=ROW_BYTES, num_flops=2 * H * (2 * C + R), units=S)


def memory(S: int, impl: str) -> tuple[float, float]:
    """Largest ratio of storage to rows during the appends, and mebibytes at their end."""
    cache, units = KINDS[impl](S), NUM_APPENDED[impl](S)
    worst = 0.0
    for position in range(S + 1, S + units + 1):
        cache.append(1)
        worst = max(worst, cache.held() / (position * ROW_BYTES))
    return worst, cache.held() / 2**20


APPEND = Comparison(impls=(STOCK, DENSE, PAGED), setup=setup)
DECODE = Comparison(impls=(DENSE, PAGED), setup=setup_decode)
LIMITS = {DENSE: GROWTH, PAGED: 1.0 + PAGE_SIZE / 1024}


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    if point["op"] == "decode":
        return [_in_microseconds(placed(row)) for row in DECODE.rows_at(point, options, on_round)]
    rows: list[Row] = []
    for row in APPEND.rows_at(point, options, on_round):
        impl = str(row["impl"])
        worst, mebibytes = memory(int(point["S"]), impl)
        held = {"MiB": mebibytes, "worst_held/needed": worst, "limit": LIMITS.get(impl)}
        rows.append({**_in_microseconds(placed(row)), **held})
    return rows


def _in_microseconds(row: Row) -> dict[str, Any]:
    return {
        key.replace("_ms", "_us"): 1e3 * float(value) if key.endswith("_ms") and value else value
        for key, value in row.items()
    }


BENCHMARK = Benchmark(
    name="cache",
    title="Appending a token, and decoding: microseconds per appended and per cached token",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "p20_us", "p80_us"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
