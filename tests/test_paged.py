"""PagedLatentCache: shared and copied pages, batches that follow the pool, captured steps."""

from __future__ import annotations

import gc

import torch
from helpers import randn
from pools import C, R, Z, append, contents, filled, small
from test_cache import config
from torch import Tensor

from mla import PagedLatentCache
from mla.codec import Fp8Codec, Int4Codec
from mla.ops import mla_append, mla_decode


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
