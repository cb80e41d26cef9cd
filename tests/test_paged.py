"""PagedLatentCache: sharing, copies, eviction, and what it refuses."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from helpers import randn
from test_cache import config
from torch import Tensor

from mla import PagedLatentCache
from mla.cache import CacheFull, PagedBatch
from mla.cache.pages import PageAllocator
from mla.checks import ShapeError, UnsupportedError
from mla.codec import Fp8Codec, Int4Codec
from mla.ops import mla_append, mla_decode, mla_gather

C, R, Z = 5, 2, 4


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


def test_a_prompt_finds_the_pages_of_the_same_tokens_and_leaves_one_to_compute():
    pool = small()
    filled(pool, list(range(9)))
    lengths = {9: 8, 10: 8, 8: 4, 5: 4, 4: 0}
    for length, found in lengths.items():
        assert pool.length(pool.allocate(list(range(length)))) == found
    assert pool.length(pool.allocate([0, 1, 2, 3, 4, 5, 6, 0, 8])) == 4
    assert pool.length(pool.allocate([9, 1, 2, 3, 4])) == 0
    for same in (torch.arange(9), torch.arange(9).numpy(), range(9), list(torch.arange(9))):
        assert pool.length(pool.allocate(same)) == 8
    assert pool.length(pool.allocate(list(range(9)), salt="another adapter")) == 0
    assert pool.length(pool.allocate()) == 0
    assert pool.num_free_pages == 10 - 3
    pool.check()


def test_equal_pages_at_other_positions_are_not_found():
    pool = small()
    filled(pool, [1, 2, 3, 4] * 2 + [0])
    assert pool.length(pool.allocate([1, 2, 3, 4] * 3)) == 8


def test_pages_are_found_only_after_every_layer_has_written_them():
    pool = small(num_layers=2)
    ids = list(range(6))
    batch = pool.batch([pool.allocate(ids)])
    batch.reserve(6)
    rows = torch.zeros(1, 6, C + R)
    batch.append(0, rows[..., :C], rows[..., C:])
    assert pool.length(pool.allocate(ids)) == 0
    batch.append(1, rows[..., :C], rows[..., C:])
    assert pool.length(pool.allocate(ids)) == 4


def test_rows_that_a_failed_step_left_out_are_never_found():
    pool = small(num_layers=2)
    ids = list(range(9))
    batch = pool.batch([pool.allocate(ids)])
    batch.reserve(2)
    batch.append(0, torch.zeros(1, 2, C), torch.zeros(1, 2, R))  # and the second layer raises
    append(batch, [7])  # not taken back: the caller goes on
    assert pool.length(pool.allocate(ids)) == 0
    batch.truncate([0])
    append(batch, [9], token_ids=[ids])
    assert pool.length(pool.allocate(ids)) == 8
    pool.check()


def test_generated_tokens_are_found_where_their_ids_are_told():
    pool = small()
    chat = filled(pool, [1, 2])
    batch = pool.batch([chat])
    for token in (3, 4, 5):
        append(batch, [1], token_ids=[[token]])
    assert pool.length(pool.allocate([1, 2, 3, 4, 5])) == 4
    append(batch, [1])  # an unknown token: no page from here on has known contents
    append(batch, [6], token_ids=[[7, 8, 9, 10, 11, 12]])
    assert pool.length(pool.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 4
    pool.check()


def test_a_rolled_back_draft_is_not_taken_for_what_followed():
    pool = small()
    chat = filled(pool, [1, 2])
    batch = pool.batch([chat])
    append(batch, [4], token_ids=[[3, 4, 5, 6]])
    batch.truncate([3])
    append(batch, [3], seed=1)  # other tokens, of unknown ids
    assert pool.length(pool.allocate([1, 2, 3, 4, 5])) == 0
    batch.truncate([3])
    append(batch, [3], seed=1, token_ids=[[9, 8, 7]])
    assert pool.length(pool.allocate([1, 2, 3, 4, 5])) == 0
    assert pool.length(pool.allocate([1, 2, 3, 9, 5])) == 4


def test_a_freed_prompt_is_found_until_its_pages_are_needed_tail_and_oldest_first():
    pool = small(num_pages=6)
    old, new = filled(pool, list(range(9))), filled(pool, list(range(50, 59)))
    pool.free(old, new)
    assert pool.num_free_pages == 6
    append(pool.batch([pool.allocate()]), [3 * Z])  # two were never kept: one of the old goes
    assert pool.length(pool.allocate(list(range(9)))) == 4
    assert pool.length(pool.allocate(list(range(50, 59)))) == 8
    pool.check()


def test_finding_a_page_saves_it_from_eviction():
    pool = small(num_pages=3)
    pool.free(filled(pool, list(range(5))))
    chat = pool.allocate(list(range(5)))
    assert pool.num_free_pages == 2
    with pytest.raises(CacheFull):
        pool.batch([pool.allocate()]).reserve(3 * Z)
    append(pool.batch([chat]), [2 * Z])
    pool.check()


def test_forks_share_until_they_write():
    pool = small(num_layers=2)
    first = filled(pool, list(range(6)))
    before = contents(pool, first)
    second, third = pool.fork(first), pool.fork(first)
    assert pool.num_free_pages == 8
    batch = pool.batch([second, third])
    rows = append(batch, [1, 2], seed=3)
    assert pool.num_free_pages == 6  # each copied the half page, the full one is shared
    for layer in range(2):
        assert torch.equal(contents(pool, first, layer), before)
        assert torch.equal(contents(pool, second, layer), torch.cat([before, rows[0, :1]]))
        assert torch.equal(contents(pool, third, layer), torch.cat([before, rows[1]]))
    append(pool.batch([first]), [1])
    assert pool.num_free_pages == 6  # the last user of the half page needs no copy
    pool.check()


def test_two_rows_of_one_batch_that_share_a_page_may_both_write():
    pool = small(num_pages=2)
    first = filled(pool, [1, 2])
    before = contents(pool, first)
    second = pool.fork(first)
    rows = append(pool.batch([first, second]), [1, 1], seed=3)
    assert torch.equal(contents(pool, first), torch.cat([before, rows[0]]))
    assert torch.equal(contents(pool, second), torch.cat([before, rows[1]]))
    assert pool.num_free_pages == 0


def test_rewriting_a_page_that_others_find_leaves_theirs_alone():
    pool = small()
    first = filled(pool, list(range(6)))
    second = pool.allocate(list(range(6)))
    before = contents(pool, second)
    pool.truncate(first, 2)
    append(pool.batch([first]), [4], seed=9)
    assert torch.equal(contents(pool, second), before)
    pool.truncate(second, 1)
    append(pool.batch([second]), [4], seed=9)  # nobody else's: written in place, not found again
    assert pool.length(pool.allocate(list(range(6)))) == 0
    pool.check()


def test_copies_are_those_of_the_stored_bytes():
    """Rows are quantised once: a copied page holds the bytes of the first one."""
    pool = PagedLatentCache(config(24, 6), num_pages=2, page_size=Z, codec=Int4Codec())
    first = pool.allocate()
    batch = pool.batch([first])
    batch.reserve(3)
    batch.append(0, randn(1, 3, 24, seed=1), randn(1, 3, 6, seed=2))
    stored = pool.rows(0)[0, :3].clone()
    pool.batch([pool.fork(first)]).reserve(1)
    assert torch.equal(pool.rows(0)[1, :3], stored)


def test_reorder_shares_instead_of_copying():
    pool = small()
    a, b, c = (filled(pool, [i] * (i + 3)) for i in range(3))
    batch = pool.batch([a, b, c])
    rows = [contents(pool, sequence) for sequence in (a, b, c)]
    batch.reorder([2, 0, 2])
    assert batch.sequences == (a, b, c) and batch.lengths.tolist() == [5, 3, 5]
    for sequence, source in ((a, 2), (b, 0), (c, 2)):
        assert torch.equal(contents(pool, sequence), rows[source])
    assert pool.num_free_pages == 10 - 3
    pool.check()


def test_batches_follow_what_happens_to_their_sequences_elsewhere():
    pool = small()
    a, b = filled(pool, [1, 2, 3]), filled(pool, [4, 5])
    batch = pool.batch([a, None, b])
    append(pool.batch([b, a]), [3, 2])
    assert batch.lengths.tolist() == [5, 0, 5]
    pool.check()
    pool.truncate(a, 1)
    pool.free(b)
    assert batch.lengths.tolist() == [1, 0, 0] and batch.sequences == (a, None, None)
    pool.check()
    batch.select([None, a, None])
    assert batch.lengths.tolist() == [0, 1, 0]
    append(batch, [0, 4, 0])
    assert pool.length(a) == 5
    batch.reset()
    assert pool.length(a) == 0 and pool.sequences == (a,)


def test_idle_rows_get_nothing():
    pool = small(num_layers=2)
    a = pool.allocate()
    batch = pool.batch([None, a])
    for _ in range(2):
        for layer in range(2):
            batch.ensure_reserved(layer, 3, starts=None)
            new_lengths = batch.new_lengths(3)
            assert new_lengths is not None and new_lengths.tolist() == [0, 3]
            batch.append(layer, torch.ones(2, 3, C), torch.ones(2, 3, R))
    assert batch.lengths.tolist() == [0, 6]
    pool.free(a)
    for layer in range(2):
        batch.ensure_reserved(layer, 1, starts=None)
        batch.append(layer, torch.ones(2, 1, C), torch.ones(2, 1, R))
    assert batch.lengths.tolist() == [0, 0]


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


def test_a_captured_step_of_a_fixed_batch_stays_right():
    """The tensors of one view, taken once, serve every later step, as a captured graph does."""
    pool = small(num_pages=20)
    batch = pool.batch([filled(pool, [1, 2]), filled(pool, [3]), None], max_length=5 * Z)
    view = batch.view(0)
    new_lengths = batch.new_lengths(1)
    rows, query = torch.zeros(3, 1, C + R), randn(3, 1, 2, C + R, seed=5)

    def replay() -> Tensor:
        mla_append(view, rows[..., :C], rows[..., C:], new_lengths=new_lengths)
        return mla_decode(
            query[..., :C], query[..., C:], view, scale=0.3, query_lengths=new_lengths
        ).out

    for step in range(25):
        if step == 7:
            batch.reorder([1, 0, 2])
        if step == 11:
            batch.select([None, pool.fork(batch.sequences[0]), pool.allocate()])
        if step == 16:
            batch.truncate([0, 9, 5])
        batch.reserve(1, token_ids=[None, None, [step] if step >= 11 else None])
        rows.copy_(randn(3, 1, C + R, seed=step))
        out = replay()
        batch.commit()
        pool.check()
        for row, sequence in enumerate(batch.sequences):
            if sequence is None:
                assert not out[row].any()
                continue
            alone = pool.batch([sequence]).view(0)
            expected = mla_decode(query[row : row + 1, ..., :C], query[row : row + 1, ..., C:],
                                  alone, scale=0.3)  # fmt: skip
            torch.testing.assert_close(out[row], expected.out[0])
            assert torch.equal(contents(pool, sequence)[-1], rows[row, 0])
    assert view.page_table is batch.page_table and batch.view(0).max_length == view.max_length
    told = [11, 12, 13, 14]  # of row 2, which began at step 11 with a new sequence
    assert pool.length(pool.allocate([*told, 0])) == 4


def test_replayed_steps_without_a_commit_are_not_found():
    pool = small()
    batch = pool.batch([pool.allocate(list(range(6)))])
    for _ in range(6):
        batch.reserve(1)
    assert pool.length(pool.allocate(list(range(6)))) == 0
    assert len(pool._steps) == 1


def test_a_compiled_step_writes_and_is_found():
    pool = small(num_layers=2)
    batch = pool.batch([pool.allocate(list(range(6)))], max_length=20)

    def step(rows: Tensor) -> None:
        for layer in range(2):
            batch.append(layer, rows[..., :C], rows[..., C:])

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    rows = randn(1, 6, C + R, seed=1)
    batch.reserve(6)
    compiled(rows)
    found = pool.allocate(list(range(6)))
    assert pool.length(found) == 4
    assert torch.equal(contents(pool, found, 1), rows[0, :4])


def test_scrubbing_clears_what_nobody_can_come_to():
    pool = small(num_layers=2, scrub_on_free=True, num_pages=4)
    for layer in range(2):
        pool.rows(layer).fill_(1.0)
    a, b = filled(pool, list(range(6))), pool.allocate()
    append(pool.batch([b]), [5])
    used = torch.tensor([0, 1, 2, 3])
    pool.truncate(a, 4)
    pool.free(b)
    for layer in range(2):
        is_clear = [not page.any() for page in pool.rows(layer)[used]]
        assert is_clear == [False, True, True, True]
    pool.free(a)
    assert pool.rows(0)[0].all()  # kept, because it can be found
    append(pool.batch([pool.allocate()]), [4 * Z - 1])
    assert [bool((page == 0).any()) for page in pool.rows(0)].count(True) == 1
    pool.reset()
    assert not any(pool.rows(layer).any() for layer in range(2))


def test_reset_forgets_all():
    pool = small()
    filled(pool, list(range(9)))
    batch = pool.batch([filled(pool, list(range(9)))])
    pool.reset()
    assert pool.sequences == () and batch.sequences == (None,) and batch.lengths.tolist() == [0]
    assert pool.num_free_pages == 10 and pool.length(pool.allocate(list(range(9)))) == 0
    pool.check()


def test_batches_do_not_outlive_their_use():
    pool = small()
    a = pool.allocate(list(range(9)))
    append(pool.batch([a]), [9])
    gc.collect()
    assert len(pool._batches) == 0
    assert pool.length(pool.allocate(list(range(9)))) == 8  # what the batch wrote still counts


def test_sizes_and_bytes():
    torch.set_default_dtype(torch.bfloat16)
    pool = PagedLatentCache(config(512, 64), num_pages=3, num_layers=2)
    assert pool.rows(1).shape == (3, 64, 576) and pool.rows(1).dtype == torch.bfloat16
    assert pool.nbytes == 2 * 3 * 64 * 1152 and pool.num_layers == 2 and pool.num_pages == 3
    coded = PagedLatentCache(config(512, 64), num_pages=3, page_size=16, codec=Fp8Codec())
    assert coded.nbytes == 3 * 16 * 656 and coded.device.type == "cpu"
    layers = PagedLatentCache([config(5, 2), config(7, 0)], num_pages=1)
    assert [layers.rows(i).shape[2] for i in range(2)] == [7, 7]


def test_the_table_grows_with_its_rows():
    pool = small(num_pages=40)
    batch = pool.batch([pool.allocate(), pool.allocate()])
    for step in range(70):
        append(batch, [1, step % 2], seed=step)
    pool.check()
    assert batch.page_table.shape[1] == 32 and batch.view(0).max_length == 70


ROWS = torch.zeros(1, 2, C + R)


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
