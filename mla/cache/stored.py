"""What of a cache goes into a file, and a new cache from it, one pair of functions for each layout.

    dense   lengths and starts in the header; rows of a sequence are one run of positions
    paged   lengths, page size, number of pages in the header; pages and token ids of all sequences
            one after the other as integer tensors; each page in use is stored once, up to the last
            position that a sequence has in it

Dims: U stored positions, N pages or token ids of all sequences, Z positions in one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.cache.base import CacheFull
from mla.cache.dense import DenseLatentCache
from mla.cache.paged import PagedLatentCache
from mla.cache.prefix import CachedSequence
from mla.checks import ShapeError, UnsupportedError


class Run(NamedTuple):
    """Stored positions that lie one after the other: slots ``begin`` to ``end - 1`` of a page."""

    page: int
    begin: int
    end: int


class Stored(NamedTuple):
    """A cache without its rows."""

    fields: dict[str, Any]  # for the header
    tables: dict[str, Tensor]  # one-dimensional
    runs: list[Run]  # in the order of the rows


# Fields of the header of each layout, and its tables: what a reader may rely on.
FIELDS: dict[str, dict[str, type]] = {
    "dense": {"lengths": list, "starts": list},
    "paged": {
        "lengths": list,
        "token_counts": list,
        "roots": list,
        "page_size": int,
        "num_pages": int,
        "scrub_on_free": bool,
    },
}
TABLES: dict[str, dict[str, torch.dtype]] = {
    "dense": {},
    "paged": {"pages": torch.int32, "token_ids": torch.int64},
}


def places(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """Page and slot of each stored position, both ``[U]`` int64."""
    counts = torch.tensor([run.end - run.begin for run in runs], dtype=torch.int64)
    pages = torch.tensor([run.page for run in runs], dtype=torch.int64)
    slots = [torch.arange(run.begin, run.end) for run in runs]
    return pages.repeat_interleave(counts), torch.cat([counts.new_empty(0), *slots])


def dense_state(cache: DenseLatentCache) -> Stored:
    """A dense cache between two steps.

    Raises:
        ShapeError: a layer has not appended its rows of the current step.
    """
    unwritten = [layer for layer, is_pending in enumerate(cache._pending) if is_pending]
    if unwritten:
        raise ShapeError(
            f"save_cache: cache has layers {unwritten} without rows for the reserved positions, "
            "expected a finished step"
        )
    lengths, starts = cache._host_lengths, cache._host_starts
    fields = {
        "lengths": list(lengths),
        "starts": list(starts),
        "max_length": cache.capacity if cache._is_fixed else None,
    }
    return Stored(fields, {}, _dense_runs(lengths, starts))


def restored_dense(
    header: Mapping[str, Any], options: Mapping[str, Any], max_length: int | None
) -> tuple[DenseLatentCache, list[Run]]:
    """A cache of the same form without rows, and where they belong.

    Raises:
        CacheFull: ``max_length`` is too small.
    """
    lengths, starts = header["lengths"], header["starts"]
    cache = DenseLatentCache(
        batch_size=len(lengths),
        max_length=header.get("max_length") if max_length is None else max_length,
        **options,
    )
    cache._make_room(lengths)
    cache._set_lengths(lengths)
    cache._set_starts(starts)
    return cache, _dense_runs(lengths, starts)


def _dense_runs(lengths: Sequence[int], starts: Sequence[int]) -> list[Run]:
    bounds = zip(starts, lengths, strict=True)
    return [Run(row, start, length) for row, (start, length) in enumerate(bounds)]


def paged_state(pool: PagedLatentCache) -> Stored:
    """The sequences of a pool between two steps, their pages numbered anew.

    Raises:
        ShapeError: a sequence has reserved positions that are not written.
        UnsupportedError: the pool holds one shard of its sequences.
    """
    if pool.shard != (0, 1):
        raise UnsupportedError(
            f"save_cache: pool has shard {pool.shard}, expected (0, 1); a shard alone is no cache"
        )
    pool._settle()
    for sequence, record in pool._records.items():
        if record.written < record.length:
            raise ShapeError(
                f"save_cache: sequence {sequence} has {record.written} written positions of "
                f"{record.length}, expected a finished step; truncate it to those, and after a "
                "replayed graph call PagedBatch.commit"
            )
    records = list(pool._records.values())
    order = dict.fromkeys(page for record in records for page in record.pages)
    number = {page: i for i, page in enumerate(order)}
    numbered = [[number[page] for page in record.pages] for record in records]
    lengths = [record.length for record in records]
    fields = {
        "lengths": lengths,
        "token_counts": [len(record.token_ids) for record in records],
        "roots": [record.root.hex() for record in records],
        "page_size": pool.page_size,
        "num_pages": pool.num_pages,
        "scrub_on_free": pool.scrub_on_free,
    }
    columns = {
        "pages": [page for pages in numbered for page in pages],
        "token_ids": [token for record in records for token in record.token_ids],
    }
    tables = {
        name: torch.tensor(columns[name], dtype=dtype) for name, dtype in TABLES["paged"].items()
    }
    used = _used_slots(numbered, lengths, pool.page_size)
    return Stored(fields, tables, [Run(p, 0, used[i]) for i, p in enumerate(order)])


def restored_paged(
    header: Mapping[str, Any],
    tables: Mapping[str, Tensor],
    options: Mapping[str, Any],
    num_pages: int | None,
) -> tuple[PagedLatentCache, list[Run]]:
    """A pool with the same sequences, sharing and findable pages without rows, and where they go.

    Raises:
        CacheFull: ``num_pages`` is too small.
        ShapeError: the tables do not fit the header.
    """
    lengths, Z = header["lengths"], header["page_size"]
    counts = [-(-length // Z) for length in lengths]
    pages, token_ids = tables["pages"], tables["token_ids"]
    if len(pages) != sum(counts) or len(token_ids) != sum(header["token_counts"]):
        raise ShapeError(
            f"load_cache: the tables have {len(pages)} pages and {len(token_ids)} token ids, "
            f"expected {sum(counts)} and {sum(header['token_counts'])} as the header says"
        )
    needed = len(pages.unique())
    if needed > 0 and (int(pages.min()), int(pages.max())) != (0, needed - 1):
        raise ShapeError(
            f"load_cache: the tables have pages {int(pages.min())} to {int(pages.max())}, "
            f"expected 0 to {needed - 1}, each in use"
        )
    pool = PagedLatentCache(
        num_pages=header["num_pages"] if num_pages is None else num_pages,
        page_size=Z,
        scrub_on_free=header["scrub_on_free"],
        **options,
    )
    if needed > pool.num_pages:
        raise CacheFull(
            f"load_cache: num_pages has value {pool.num_pages}, expected at least the {needed} "
            "pages in the file",
            needed=needed,
            free=pool.num_pages,
        )
    taken = [pool._pages.take() for _ in range(needed)]
    numbered = [part.tolist() for part in pages.split(counts)]
    ids = [part.tolist() for part in token_ids.split(header["token_counts"])]
    for length, columns, known, root in zip(lengths, numbered, ids, header["roots"], strict=True):
        record = CachedSequence(
            root=bytes.fromhex(root),
            pages=[taken[column] for column in columns],
            length=length,
            written=length,
            token_ids=known,
        )
        pool._pages.share(record.pages)
        pool._register(record)
        for page, digest in record.new_digests(Z):
            pool._pages.publish(page, digest)
    pool._pages.release(taken)  # their sequences use them now
    used = _used_slots(numbered, lengths, Z)
    return pool, [Run(page, 0, used[i]) for i, page in enumerate(taken)]


def _used_slots(
    numbered: Sequence[Sequence[int]], lengths: Sequence[int], page_size: int
) -> dict[int, int]:
    """How many slots of each page hold a position of a sequence; the longest counts."""
    used: dict[int, int] = {}
    for pages, length in zip(numbered, lengths, strict=True):
        for column, page in enumerate(pages):
            end = min(length - column * page_size, page_size)
            used[page] = max(used.get(page, 0), end)
    return used
