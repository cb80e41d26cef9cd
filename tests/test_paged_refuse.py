"""What the pool refuses, with nothing changed, and what its check notices."""

from __future__ import annotations

import re

import pytest
import torch
from pools import C, R, filled, small

from mla.cache import CacheFull
from mla.cache.pages import PageAllocator
from mla.checks import ShapeError, UnsupportedError

ROWS = torch.zeros(1, 2, C + R)


def test_layers_do_not_reserve_on_top_of_a_step_that_others_have_not_written():
    """A batch for each layer, or a second try after an exception, would count tokens twice."""
    pool = small(num_layers=2)
    a = pool.allocate()
    rows = torch.zeros(1, 2, C), torch.zeros(1, 2, R)
    batch = pool.batch([a])
    batch.ensure_reserved(0, 2, starts=None)
    batch.append(0, *rows)
    message = "row 0 has 0 of 2 positions written by every layer, expected all before a new step"
    for again, layer in ((pool.batch([a]), 1), (batch, 0)):
        with pytest.raises(ShapeError, match=message):
            again.ensure_reserved(layer, 2, starts=None)
    assert pool.length(a) == 2
    batch.ensure_reserved(1, 2, starts=None)
    batch.append(1, *rows)
    pool.batch([a]).ensure_reserved(0, 2, starts=None)
    assert pool.length(a) == 4
    pool.truncate(a, 2)
    pool.batch([a]).ensure_reserved(0, 2, starts=None)
    assert pool.length(a) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p, a: p.free(a, a),
            "PagedLatentCache.free: sequences has value ({a}, {a}), expected each once",
        ),
        (
            lambda p, a: p.free(a) or p.free(a),
            "PagedLatentCache.free: sequence has value {a}, expected an id that this pool "
            "allocated and has not freed",
        ),
        (
            lambda p, a: p.fork(-1),
            "PagedLatentCache.fork: sequence has value -1, expected an id",
        ),
        (
            lambda p, a: p.truncate(a, 7),
            "PagedLatentCache.truncate: length has value 7, expected 0 to 6",
        ),
        (
            lambda p, a: p.batch([a, a]),
            "PagedBatch.select: sequences has value [{a}, {a}], expected 2 that differ",
        ),
        (
            lambda p, a: p.batch([]),
            "PagedBatch: batch_size, layers have values 0, 1, expected at least 1 of each",
        ),
        (
            lambda p, a: p.batch([a], max_length=0),
            "PagedLatentCache.batch: max_length has value 0, expected at least 1 or None",
        ),
        (
            lambda p, a: p.batch([a, None]).reserve([1, 1]),
            "PagedBatch.reserve: new_lengths has 1 tokens for row 1, expected 0 for an idle row",
        ),
        (
            lambda p, a: p.batch([a]).reserve([2], token_ids=[[1]]),
            "PagedBatch.reserve: token_ids has [1] tokens, expected [2] or None",
        ),
        (
            lambda p, a: p.batch([a]).append(0, ROWS[..., :C], ROWS[..., C:]),
            "PagedBatch.append: layer_idx=0 has no reservation, expected reserve(new_lengths) "
            "once before the first layer of a step",
        ),
        (
            lambda p, a: p.batch([a, None]).reorder([1, 0]),
            "PagedBatch.reorder: indices has value [1, 0], expected 2 numbers of 0 to 1, idle "
            "rows from idle rows",
        ),
        (
            lambda p, a: p.batch([a]).truncate([7]),
            "PagedBatch.truncate: lengths has value [7], expected at most [6], and at least the "
            "first visible positions",
        ),
        (lambda p, a: p.rows(1), "PagedLatentCache.rows: layer_idx has value 1, expected 0 to 0"),
        (
            lambda p, a: p.allocate(torch.zeros(2, 2)),
            "PagedLatentCache.allocate: token_ids has shape (2, 2) and dtype torch.float32, "
            "expected [length] integers",
        ),
        (
            lambda p, a: p.allocate([[1], [2]]),
            "PagedLatentCache.allocate: token_ids has value [[1], [2]], expected 64-bit integers",
        ),
        (
            lambda p, a: p.allocate([2**63]),
            "PagedLatentCache.allocate: token_ids has value [9223372036854775808], expected "
            "64-bit integers",
        ),
        (
            lambda p, a: small(page_size=0),
            "PagedLatentCache: num_pages, page_size, layers have values 10, 0, 1, expected at "
            "least 1 of each and int32 page numbers",
        ),
        (
            lambda p, a: small(dtype=torch.int8),
            "PagedLatentCache: dtype has value torch.int8, expected float64 to bfloat16",
        ),
    ],
)
def test_what_it_refuses(call, message):
    pool = small()
    a = filled(pool, list(range(6)))
    with pytest.raises(ShapeError, match=re.escape(message.format(a=a))):
        call(pool, a)


def test_full():
    pool = small(num_pages=3)
    a, b = filled(pool, list(range(6))), pool.allocate()
    c = pool.fork(a)
    message = (
        "PagedLatentCache: the step has a need of 3 pages, expected at most the 1 free ones of 3; "
        "nothing has changed"
    )
    with pytest.raises(CacheFull, match=re.escape(message)) as error:
        pool.batch([a, b, c]).reserve([1, 1, 3])
    assert (error.value.needed, error.value.free) == (3, 1)
    assert [pool.length(s) for s in (a, b, c)] == [6, 0, 6]
    message = "PagedBatch.reserve: max_length has value 6, expected at least 7; nothing has changed"
    with pytest.raises(CacheFull, match=re.escape(message)):
        pool.batch([a], max_length=6).reserve(1)
    with pytest.raises(CacheFull, match="max_length has value 5, expected at least 6"):
        pool.batch([a], max_length=5)
    pool.check()


def test_no_other_batch_grows_a_row_beyond_the_table_of_a_fixed_one():
    pool = small()
    a, b = filled(pool, [1, 2, 3]), filled(pool, list(range(7)))
    fixed = pool.batch([a, None], max_length=4)
    address = fixed.page_table.data_ptr()
    both = pool.batch([a, b])
    message = "max_length has value 4, expected at least 5; nothing has changed"
    with pytest.raises(CacheFull, match=f"PagedBatch.reserve: {message}"):
        both.reserve([2, 1])
    with pytest.raises(CacheFull, match=f"PagedBatch.reorder: {message.replace('5', '7')}"):
        both.reorder([1, 1])
    assert both.lengths.tolist() == [3, 7] and fixed.lengths.tolist() == [3, 0]
    both.reserve([1, 2])
    both.truncate([4, 1])
    both.reorder([1, 0])
    pool.check()
    assert fixed.lengths.tolist() == [1, 0] and fixed.page_table.data_ptr() == address


def test_left_padding_is_refused():
    pool = small()
    batch = pool.batch([pool.allocate()])
    with pytest.raises(UnsupportedError, match="expected None or zeros; pad on the right"):
        batch.reserve(3, starts=[1])
    batch.reserve(3, starts=[0])


def test_the_books_notice_a_page_released_twice():
    pages = PageAllocator(2)
    page = pages.take()
    pages.release([page])
    with pytest.raises(AssertionError, match="released more often than it was taken"):
        pages.release([page])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool, a: pool._pages._free.append(0), "is not just one of"),
        (lambda pool, a: pool._pages._free.append(9), "free twice"),
        (lambda pool, a: pool._pages.share([0]), "counts 2 users, 1 use it"),
        (lambda pool, a: pool._records[a].pages.pop(), "of length 6 has 1 pages"),
        (lambda pool, a: pool._records[a].token_ids.__setitem__(0, 7), "digests of other tokens"),
        (lambda pool, a: pool._pages._page_of.clear(), "not the one that its hash finds"),
        (lambda pool, a: setattr(pool._records[a], "written", 9), "9 written positions"),
        (lambda pool, a: next(iter(pool._batches)).lengths.add_(1), "shows length 7, expected 6"),
        (lambda pool, a: next(iter(pool._batches)).page_table.add_(1), "row 0 shows pages"),
    ],
)
def test_check_notices(spoil, message):
    pool = small()
    a = filled(pool, list(range(6)))
    batch = pool.batch([a])
    pool.allocate()
    pool.check()
    spoil(pool, a)
    with pytest.raises(AssertionError, match=message):
        pool.check()
    del batch
