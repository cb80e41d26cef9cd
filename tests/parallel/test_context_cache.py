"""A pool cut over ranks: together the shards hold what one whole pool holds, each its part."""

from __future__ import annotations

import pytest
import torch
from helpers import poison_, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS
from test_cache import config
from torch import Tensor

from mla import DenseLatentCache, PagedLatentCache
from mla.cache import CacheFull, PagedBatch, save_cache
from mla.checks import ShapeError, UnsupportedError
from mla.codec import Codec, Int8Codec, PlainCodec
from mla.ops import mla_gather
from mla.parallel.context import shard_view
from mla.view import CacheView, positions_of

C, R = 5, 2


def pools(count: int, page_size: int = 3, num_pages: int = 12, **options: object):
    """A whole pool and the shards of one, with poison where nothing is written."""
    whole = PagedLatentCache(config(C, R), num_pages=4 * num_pages, page_size=page_size, **options)
    shards = [
        PagedLatentCache(
            config(C, R), num_pages=num_pages, page_size=page_size, shard=(i, count), **options
        )
        for i in range(count)
    ]
    for pool in (whole, *shards):
        poison_(pool.rows(0))
    return whole, shards


def contents(views: list[CacheView], length: int) -> list[Tensor]:
    return [torch.cat(mla_gather(view, 0, length, dtype=torch.float32), dim=-1) for view in views]


def owned(view: CacheView, length: int) -> Tensor:
    """``[length]`` bool: whether a position lies on this shard."""
    mask = torch.zeros(view.capacity, dtype=torch.bool)
    mask[positions_of(view, view.page_table.shape[1]).flatten()] = True
    return mask[:length]


def assert_shards_are_the_whole(whole: PagedBatch, shards: list[PagedBatch]) -> None:
    length = max(whole.max_length, 1)
    expected = contents([whole.view(0)], length)[0]
    views = [batch.view(0) for batch in shards]
    for view, part in zip(views, contents(views, length), strict=True):
        mine = owned(view, length)
        assert torch.equal(part[:, mine], expected[:, mine])
        assert (part[:, ~mine] == 0).all()
        assert torch.equal(view.lengths, whole.lengths)
    assert torch.stack([owned(view, length) for view in views]).sum(0).eq(1).all()


STEPS = st.lists(
    st.sampled_from(["append", "append", "append", "truncate", "reorder", "fork"]), max_size=8
)


@given(
    steps=STEPS,
    count=st.integers(1, 4),
    page_size=st.sampled_from([1, 3, 4]),
    codec=st.sampled_from(CODECS),
    data=st.data(),
)
def test_shards_hold_what_one_pool_holds(steps, count, page_size, codec, data):
    whole, shards = pools(count, page_size, num_pages=40, codec=codec)
    everybody = [whole, *shards]
    batches = [pool.batch([pool.allocate(), pool.allocate()]) for pool in everybody]
    for number, step in enumerate(steps):
        if step == "append":
            counts = data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7)))
            rows = randn(2, max(counts), C + R, seed=number)
            for batch in batches:
                batch.reserve(counts)
                batch.append(0, rows[..., :C], rows[..., C:])
        elif step == "truncate":
            lengths = [data.draw(st.integers(0, n)) for n in batches[0].lengths.tolist()]
            for batch in batches:
                batch.truncate(lengths)
        elif step == "reorder":
            order = data.draw(st.permutations([0, 1]))
            for batch in batches:
                batch.reorder(order)
        else:  # the fork goes on, the first sequence stays behind
            for pool, batch in zip(everybody, batches, strict=True):
                batch.select([pool.fork(batch.sequences[0]), batch.sequences[1]])
        assert_shards_are_the_whole(batches[0], batches[1:])
        for pool in everybody:
            pool.check()


@pytest.mark.parametrize("count", [2, 3])
def test_each_rank_takes_its_part_of_the_memory(count):
    Z, length = 4, 41
    _, shards = pools(count, page_size=Z)
    used = []
    for pool in shards:
        batch = pool.batch([pool.allocate()])
        batch.reserve(length)
        used.append(pool.num_pages - pool.num_free_pages)
    assert used == [-(-length // (Z * count))] * count  # the whole has ceil(41 / 4) pages
    assert shards[0].nbytes == 12 * Z * (C + R) * 4


def test_shards_find_the_same_prefix():
    _, shards = pools(2, page_size=2)
    prompt = list(range(11))
    for pool in shards:
        batch = pool.batch([pool.allocate(prompt)])
        batch.reserve(len(prompt))
        batch.append(0, *randn(1, len(prompt), C + R, seed=0).split([C, R], dim=-1))
        again = pool.allocate(prompt)
        assert pool.length(again) == 8  # two pages of two shards


def test_a_fixed_batch_has_columns_for_its_length():
    _, shards = pools(2, page_size=4)
    batch = shards[0].batch([shards[0].allocate()], max_length=17)
    assert batch.page_table.shape == (1, 3) and batch.view(0).max_length == 17
    with pytest.raises(CacheFull):
        batch.reserve(97)


@pytest.mark.parametrize("codec", [PlainCodec(), Int8Codec()], ids=lambda codec: codec.kind)
def test_pages_are_cut_out_of_a_dense_cache(codec: Codec):
    cache = DenseLatentCache(config(C, R), batch_size=2, max_length=24, codec=codec)
    cache.reserve([17, 5])
    cache.append(0, *randn(2, 17, C + R, seed=0).split([C, R], dim=-1))
    whole = contents([cache.view(0)], 17)[0]
    views = [shard_view(cache.view(0), (i, 2), page_size=3) for i in range(2)]
    for view, part in zip(views, contents(views, 17), strict=True):
        mine = owned(view, 17)
        assert torch.equal(part[:, mine], whole[:, mine]) and (part[:, ~mine] == 0).all()
        assert view.rows.data_ptr() == cache.view(0).rows.data_ptr()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pages_are_cut_out_of_a_paged_cache(count):
    whole, _ = pools(1)
    batch = whole.batch([whole.allocate(), whole.allocate()])
    batch.reserve([13, 4])
    batch.append(0, *randn(2, 13, C + R, seed=0).split([C, R], dim=-1))
    expected = contents([batch.view(0)], 13)[0]
    views = [shard_view(batch.view(0), (i, count), page_size=3) for i in range(count)]
    parts = contents(views, 13)
    assert torch.equal(torch.stack(parts).sum(0), expected)


def test_refusals():
    with pytest.raises(ShapeError, match=r"PagedLatentCache: shard has value \(2, 2\)"):
        PagedLatentCache(config(C, R), num_pages=1, shard=(2, 2))
    whole, shards = pools(2)
    with pytest.raises(UnsupportedError, match=r"save_cache: pool has shard \(0, 2\)"):
        save_cache(shards[0], "never-written")
    view = shards[0].batch([None]).view(0)
    with pytest.raises(ShapeError, match=r"shard_view: view has shard \(0, 2\) and pages of 3"):
        shard_view(view, (0, 2), page_size=3)
    with pytest.raises(ShapeError, match=r"and pages of 3, expected .* and 4"):
        shard_view(whole.batch([None]).view(0), (0, 2), page_size=4)
    dense = DenseLatentCache(config(C, R), batch_size=2, max_length=24).view(0)
    with pytest.raises(ShapeError, match=r"has 24 positions a row .* multiple of page_size=5"):
        shard_view(dense, (0, 2), page_size=5)
