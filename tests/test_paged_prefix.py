"""Pages found by the tokens they hold: when, by whom, and for how long."""

from __future__ import annotations

import pytest
import torch
from pools import C, R, Z, append, contents, filled, small

from mla.cache import CacheFull


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


def test_replayed_steps_without_a_commit_are_not_found():
    pool = small()
    batch = pool.batch([pool.allocate(list(range(6)))])
    for _ in range(6):
        batch.reserve(1)
    assert pool.length(pool.allocate(list(range(6)))) == 0
    assert len(pool._steps) == 1
