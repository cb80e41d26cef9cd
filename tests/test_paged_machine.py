"""PagedLatentCache against a dictionary of histories: random steps, failures and evictions.

What a layer caches at a position depends on all tokens up to it, so here the row at a position is
computed from a digest of its history: it names its owner, and two sequences may share it only if
their histories agree. Tokens that the cache is not told are unique.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import poison_
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools import SIZES, History, values
from test_cache import config
from torch import Tensor

from mla.cache import CacheFull, PagedBatch, PagedLatentCache
from mla.checks import ShapeError
from mla.codec import Codec, Int4Codec, Int8Codec, PlainCodec

CODECS = (PlainCodec(), Int8Codec(rope_bits=8), Int4Codec())
MOST_SEQUENCES = 6
TOKENS = st.integers(0, 1)


class PoolMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.sampled_from([20, 12, 8, 30, 4]),
        page_size=st.integers(1, 4),
        codec=st.sampled_from(CODECS),
        scrubs=st.booleans(),
        longest=st.none() | st.integers(6, 24),
        lengths=st.lists(st.integers(3, 12), min_size=2, max_size=4),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        codec: Codec,
        scrubs: bool,
        longest: int | None,
        lengths: list[int],
    ) -> None:
        self.pool = PagedLatentCache(
            [config(*sizes) for sizes in SIZES],
            num_pages=num_pages,
            page_size=page_size,
            codec=codec,
            scrub_on_free=scrubs,
            dtype=torch.float32,
        )
        for layer in range(len(SIZES)):
            rows = self.pool.rows(layer)
            rows.zero_() if scrubs else poison_(rows)
        self.model: dict[int, History] = {}
        self.published: set[bytes | None] = set()
        self.has_lost = False  # a published page may have been evicted or overwritten
        self.serial = self.serial_at_reset = 0
        self.prompts: list[list[int]] = []
        self.longest = longest
        self.held = self.pool.batch([None, None], max_length=longest)
        self.addresses = (self.held.page_table.data_ptr(), self.held.lengths.data_ptr())
        for length in lengths:
            self.prompts.append([0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1][:length])
            self.compute(self.allocated(self.prompts[-1], ""))
        shown = [s for s in self.model if longest is None or self.pool.length(s) <= longest]
        self.held.select((shown + [None, None])[:2])

    def pick(self, data: Any) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    def is_free_for_one_more(self) -> bool:
        return len(self.model) < MOST_SEQUENCES

    @precondition(is_free_for_one_more)
    @rule(data=st.data(), salt=st.sampled_from(["", "", "", "adapter"]))
    def allocate(self, data: Any, salt: str) -> None:
        """Mostly a prompt that begins like an earlier one, and mostly computed at once."""
        tokens = data.draw(st.none() | st.lists(TOKENS, max_size=9))
        if tokens is not None and self.prompts and data.draw(st.integers(0, 3)):
            prompt = data.draw(st.sampled_from(self.prompts))
            tokens = prompt[: data.draw(st.integers(0, len(prompt)))] + tokens
        self.prompts.append(tokens or [])
        sequence = self.allocated(tokens, salt)
        if data.draw(st.integers(0, 3)):
            self.compute(sequence)

    def compute(self, sequence: int) -> None:
        """Append the prompt of a new sequence if there is room."""
        batch, count = self.pool.batch([sequence]), len(self.model[sequence].told)
        if self.reserve(batch, [count], [None]):
            self.write(batch, [count], [None], len(SIZES))

    def allocated(self, tokens: list[int] | None, salt: str) -> int:
        """A new sequence that begins with the pages that the model expects."""
        Z = self.pool.page_size
        sequence = self.pool.allocate(tokens, salt=salt)
        model = History(root=salt.encode())
        found = self.pool.length(sequence)
        ids = tokens or []
        assert found % Z == 0 and found <= max(len(ids) - 1, 0)
        for position, token in enumerate(ids):
            model.digests.append(model.next(token))
            if (position + 1) % Z == 0 and model.digests[-1] not in self.published:
                assert found <= position
        if not self.has_lost:
            full = range(Z - 1, len(ids) - 1, Z)
            misses = [p for p in full if model.digests[p] not in self.published]
            assert found == (misses[0] + 1 - Z if misses else (max(len(ids) - 1, 0)) // Z * Z)
        del model.digests[found:]
        model.told, model.ids = ids[found:], ids[:found]
        self.model[sequence] = model
        self.compare(self.pool.batch([sequence]).page_table[0], model.digests)
        return sequence

    @precondition(is_free_for_one_more)
    @rule()
    def look_for_every_prompt(self) -> None:
        """Also those that were rolled back or whose step failed: nothing wrong may be found."""
        for prompt in self.prompts[-12:]:
            sequence = self.allocated([*prompt, 0], "")
            self.pool.free(sequence)
            del self.model[sequence]

    @precondition(lambda self: 0 < len(self.model) < MOST_SEQUENCES)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        source = self.pick(data)
        copy = self.pool.fork(source)
        assert copy not in self.model
        self.model[copy] = self.model[source].copy()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def step(self, data: Any) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        self.step_of(self.pool.batch([*rows, None] if data.draw(st.booleans()) else rows), data)

    @precondition(lambda self: len(self.model) > 1)
    @rule()
    def step_of_all(self) -> None:
        """Decoding a token each; when the pool is full the first sequence has to go."""
        batch = self.pool.batch(sorted(self.model))
        counts = [1] * len(self.model)
        tokens: list[Any] = [None] * len(self.model)
        if self.reserve(batch, counts, tokens):
            self.write(batch, counts, tokens, len(SIZES))
        else:
            first = min(self.model)
            self.pool.free(first)
            del self.model[first]

    @precondition(lambda self: any(s is not None for s in self.held.sequences))
    @rule(data=st.data())
    def step_of_the_held_batch(self, data: Any) -> None:
        self.step_of(self.held, data)

    def step_of(self, batch: PagedBatch, data: Any) -> None:
        count = st.sampled_from([1, 2, 3, 6, 0])
        counts = [data.draw(count) if s is not None else 0 for s in batch.sequences]
        tokens = []
        for sequence, n in zip(batch.sequences, counts, strict=True):
            is_told = sequence is not None and data.draw(st.booleans())
            tokens.append([data.draw(TOKENS) for _ in range(n)] if is_told else None)
        if self.reserve(batch, counts, tokens):
            written = data.draw(st.sampled_from([2, 2, 2, 1, 0]))
            self.write(batch, counts, tokens, written)
            if written < len(SIZES):
                self.recover(
                    batch, counts, data.draw(st.sampled_from(["rows", "each", "free", ""]))
                )

    def reserve(self, batch: PagedBatch, counts: list[int], tokens: list[Any]) -> bool:
        """Whether there was room; the error and the pages taken are those of a model of its own."""
        Z, pool = self.pool.page_size, self.pool
        users = Counter(page for record in pool._records.values() for page in record.pages)
        wanted, needed = [], 0
        for sequence, n in zip(batch.sequences, counts, strict=True):
            length = 0 if sequence is None else pool.length(sequence)
            wanted.append(length + n)
            if sequence is None or n == 0:
                continue
            needed += -(-(length + n) // Z) - -(-length // Z)
            if length % Z and users[pool._records[sequence].pages[-1]] > 1:
                users[pool._records[sequence].pages[-1]] -= 1
                needed += 1
        available, free = pool.num_free_pages, len(pool._pages._free)
        held = [n for s, n in zip(batch.sequences, wanted, strict=True) if s in self.held.sequences]
        is_too_long = self.longest is not None and max(held, default=0) > self.longest
        if needed > available or is_too_long:
            before = self.everything(batch)
            with pytest.raises(CacheFull, match="nothing has changed") as error:
                batch.reserve(counts, token_ids=tokens)
            expected = (None, None) if is_too_long else (needed, available)
            assert (error.value.needed, error.value.free) == expected
            assert self.everything(batch) == before
            return False
        batch.reserve(counts, token_ids=tokens)
        assert pool.num_free_pages == available - needed
        self.has_lost |= needed > free
        return True

    def everything(self, *batches: PagedBatch) -> Any:
        """A copy of all that an operation may change, device and host."""
        self.pool._settle()  # which may happen at any time
        pages = self.pool._pages
        return (
            {sequence: repr(record) for sequence, record in self.pool._records.items()},
            [list(pages._free), list(pages._kept), dict(pages._page_of), list(pages._references)],
            [rows.flatten().view(torch.uint8).tolist() for rows in self.pool._rows],
            [
                [b.sequences, b.page_table.tolist(), b.lengths.tolist(), b._pending]
                for b in (self.held, *batches)
            ],
        )

    def write(self, batch: PagedBatch, counts: list[int], tokens: list[Any], layers: int) -> None:
        """Append the histories to the first ``layers`` layers, then to the model."""
        Z = self.pool.page_size
        new: list[list[bytes]] = []
        for sequence, n, ids in zip(batch.sequences, counts, tokens, strict=True):
            new.append([])
            if sequence is None or n == 0:
                continue
            model = self.model[sequence]
            told, model.told = model.told, model.told[n:]
            if ids is not None and ids != told[: len(ids)]:
                model.told = []
            ids = told[:n] if ids is None else ids
            for i in range(n):
                self.serial += 1
                if i < len(ids) and len(model.ids) == len(model.digests):
                    model.ids.append(ids[i])
                model.digests.append(model.next(ids[i] if i < len(ids) else -self.serial))
            new[-1] = model.digests[len(model.digests) - n :]
        L = max(counts) + 1
        for layer, (C, R) in enumerate(SIZES[:layers]):
            rows = torch.full((batch.batch_size, L, C + R), float("nan"))
            for b, digests in enumerate(new):
                rows[b, : len(digests)] = values(digests, layer)
            batch.append(layer, rows[..., :C], rows[..., C:])
        if layers == len(SIZES):
            for sequence in batch.sequences:
                digests = [] if sequence is None else self.model[sequence].digests
                if None not in digests:
                    self.published.update(digests[Z - 1 :: Z])

    def recover(self, batch: PagedBatch, counts: list[int], how: str) -> None:
        """After an exception between layers: take the step back, free the rows, or go on."""
        rows = [(s, n) for s, n in zip(batch.sequences, counts, strict=True) if s is not None]
        for sequence, n in rows:
            model = self.model[sequence]
            self.prompts.append(list(model.ids))
            if how in ("rows", "each"):
                model.cut(len(model.digests) - n)
            elif n:
                model.digests[-n:], model.told = [None] * n, []
        if how == "free":
            self.pool.free(*(sequence for sequence, _ in rows))
            for sequence, _ in rows:
                del self.model[sequence]
        elif how == "rows":
            lengths = batch.lengths.tolist()
            batch.truncate([length - n for length, n in zip(lengths, counts, strict=True)])
        elif how == "each":
            for sequence, n in rows:
                self.pool.truncate(sequence, self.pool.length(sequence) - n)
        if how and rows:
            with pytest.raises(ShapeError, match="no reservation"):
                batch.append(1, torch.zeros(1, 1, 5), torch.zeros(1, 1, 0))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        sequence = self.pick(data)
        model = self.model[sequence]
        length = max(0, len(model.digests) - data.draw(st.integers(0, 9)))
        self.pool.truncate(sequence, length)
        self.prompts.append(list(model.ids))
        model.cut(length)
        self.has_lost = True  # it may be the one that others with its tokens find

    @precondition(lambda self: len(self.model) > 3)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        sequence = self.pick(data)
        self.pool.free(sequence)
        del self.model[sequence]

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def select(self, data: Any) -> None:
        a, b = (data.draw(st.sampled_from([*sorted(self.model), None])) for _ in "ab")
        b = None if b == a else b
        lengths = [len(self.model[s].digests) for s in (a, b) if s is not None]
        if self.longest is not None and max(lengths, default=0) > self.longest:
            before = self.everything()
            with pytest.raises(CacheFull):
                self.held.select([a, b])
            assert self.everything() == before
        else:
            self.held.select([a, b])

    @precondition(lambda self: any(s is not None for s in self.held.sequences))
    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        rows = self.held.sequences
        order = data.draw(st.permutations([0, 1]) | st.just([0, 0]) | st.just([1, 1]))
        if any((rows[b] is None) != (rows[index] is None) for b, index in enumerate(order)):
            with pytest.raises(ShapeError, match="idle rows from idle rows"):
                self.held.reorder(order)
            return
        self.held.reorder(order)
        old = dict(self.model)
        for b, index in enumerate(order):
            if (to := rows[b]) is not None and (source := rows[index]) is not None:
                self.model[to] = old[source].copy()
        self.has_lost = True

    @precondition(lambda self: len(self.model) > 3 and self.serial > self.serial_at_reset + 60)
    @rule()
    def reset(self) -> None:
        self.serial_at_reset = self.serial  # rarely, so that there is something to lose
        self.pool.reset()
        self.model, self.published = {}, set()
        assert self.pool.num_free_pages == self.pool.num_pages and self.pool._pages.num_kept == 0

    @precondition(lambda self: len(self.model) > 2)
    @rule(data=st.data())
    def refused(self, data: Any) -> None:
        foreign = PagedLatentCache(config(5, 2), num_pages=1).allocate()
        some = [*self.model, foreign]
        calls = [
            lambda: self.pool.free(foreign),
            lambda: self.pool.free(*some),
            lambda: self.pool.free(some[0], some[0]),
            lambda: self.pool.fork(foreign),
            lambda: self.pool.truncate(some[0], 10**6),
            lambda: self.pool.batch([some[0], some[0]]),
            lambda: self.held.select(some[:1]),
            lambda: self.held.select([None, foreign]),
            lambda: self.held.reserve([1]),
            lambda: self.held.reserve([0, 0], token_ids=[[1], None]),
            lambda: self.held.truncate([10**6, 0]),
            lambda: self.held.reorder([0, 2]),
            lambda: self.pool.allocate([0.5]),
        ]
        before = self.everything()
        with pytest.raises(ShapeError):
            data.draw(st.sampled_from(calls))()
        assert self.everything() == before

    @invariant()
    def books_and_tables_agree(self) -> None:
        self.pool.check()
        assert set(self.pool.sequences) == set(self.model)
        lengths = {s: self.pool.length(s) for s in self.model}
        assert lengths == {s: len(model.digests) for s, model in self.model.items()}
        if self.longest is not None:
            held = self.held
            assert (held.page_table.data_ptr(), held.lengths.data_ptr()) == self.addresses

    @invariant()
    def rows_are_those_of_their_histories(self) -> None:
        for batch in (self.held, self.pool.batch(sorted(self.model)) if self.model else self.held):
            for row, sequence in enumerate(batch.sequences):
                digests = [] if sequence is None else self.model[sequence].digests
                assert int(batch.lengths[row]) == len(digests)
                self.compare(batch.page_table[row], digests)

    def compare(self, pages: Tensor, digests: list[bytes | None]) -> None:
        """The stored rows behind a row of a table, to the bit."""
        here = [position for position, digest in enumerate(digests) if digest is not None]
        position = torch.tensor(here, dtype=torch.long)
        Z = self.pool.page_size
        for layer, (C, _) in enumerate(SIZES):
            stored = self.pool.rows(layer)[pages[position // Z].long(), position % Z]
            rows = values([digest for digest in digests if digest is not None], layer)
            assert torch.equal(stored, self.pool.codec.encode(rows[:, :C], rows[:, C:]))

    @invariant()
    def pages_that_are_nobodys_show_nothing(self) -> None:
        free = torch.tensor(self.pool._pages._free, dtype=torch.long)
        for layer in range(len(SIZES)):
            rows = self.pool.rows(layer)
            if self.pool.scrub_on_free:
                assert not rows[free].any()
            else:
                rows[free] = poison_(rows[free])


class TestPool(PoolMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
