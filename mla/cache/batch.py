"""Some sequences of a pool as the rows of one step, in the form the layer takes a cache.

Dims: B rows of the batch, M page-table width, Z positions in one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mla.cache.base import CacheFull, LatentCache
from mla.cache.prefix import CachedSequence, Step, checked_ids
from mla.checks import ShapeError, UnsupportedError
from mla.view import CacheView

if TYPE_CHECKING:
    from mla.cache.paged import PagedLatentCache


class PagedBatch(LatentCache):
    """B sequences of a `PagedLatentCache`; make it with `PagedLatentCache.batch`.

    Give it to the layer as ``cache``. Its table and lengths are device tensors that follow the
    pool: what happens to a sequence, here, in another batch or in the pool, is written to them in
    place. A row may be idle (None): it has no tokens and gets none, its outputs mean nothing.

    With ``max_length`` the table is fixed, addresses never change and `new_lengths` is always a
    tensor: the form for CUDA graphs and compiled steps, also when idle rows come and go. The layer
    then attends absorbed except in a cold step; put long chunks through a batch without it.

    Attributes:
        pool: where the sequences live.
        page_table: ``[B, M]`` int32 on the device; entries beyond a row's pages are garbage.
    """

    def __init__(
        self, pool: PagedLatentCache, sequences: Sequence[int | None], max_length: int | None
    ) -> None:
        super().__init__(
            pool.configs,
            batch_size=len(sequences),
            codec=pool.codec,
            device=pool.device,
            dtype=pool.dtype,
        )
        if max_length is not None and max_length < 1:
            raise ShapeError(
                f"PagedLatentCache.batch: max_length has value {max_length}, "
                "expected at least 1 or None"
            )
        self.pool = pool
        self._longest = max_length
        columns = 1 if max_length is None else -(-max_length // pool.span)
        self.page_table = torch.zeros(
            self.batch_size, columns, dtype=torch.int32, device=pool.device
        )
        self._sequences: list[int | None] = [None] * self.batch_size
        self._records: list[CachedSequence | None] = [None] * self.batch_size
        self.select(sequences)

    @property
    def sequences(self) -> tuple[int | None, ...]:
        """The sequence in each row, None for an idle row."""
        return tuple(self._sequences)

    def select(self, sequences: Sequence[int | None]) -> None:
        """Show other sequences in the same B rows, in place.

        Args:
            sequences: B ids that differ, None for an idle row.

        Raises:
            ShapeError: an id is unknown or occurs twice, or there are not B; nothing has changed.
            CacheFull: a sequence is longer than ``max_length``; nothing has changed.
        """
        name = "PagedBatch.select"
        sequences = list(sequences)
        ids = [sequence for sequence in sequences if sequence is not None]
        if len(sequences) != self.batch_size or len(set(ids)) != len(ids):
            raise ShapeError(
                f"{name}: sequences has value {sequences}, expected {self.batch_size} that differ"
            )
        found = {sequence: self.pool._record(name, sequence) for sequence in ids}
        records = [None if sequence is None else found[sequence] for sequence in sequences]
        self._check_fits(name, [record.length for record in records if record is not None])
        self._sequences, self._records = sequences, records
        self._write_table({record: 0 for record in records if record is not None})
        self._write_lengths()

    def reserve(
        self,
        new_lengths: int | Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        token_ids: Sequence[Sequence[int] | Tensor | None] | None = None,
    ) -> None:
        """Make room for the tokens of one step and count them, before the first layer runs.

        Takes pages for all rows or for none. A page that other sequences share and that a row is
        about to write is first copied, in all layers. Lengths and table change in place.

        Args:
            new_lengths: tokens that each row gets, at least 0; one number for all rows that are
                not idle. With a sequence the step may be padded on the right beyond them.
            starts: left padding, which pages do not have: None or zeros.
            token_ids: ids of the new tokens of each row, so that its pages can be found by later
                sequences; None, for all or for one row: unknown, or given to `allocate` before.

        Raises:
            CacheFull: there are too few pages, or a row would pass ``max_length``, of this batch or
                of another that shows its sequence; nothing has changed.
            ShapeError: the number of rows or a value does not fit; nothing has changed.
            UnsupportedError: left padding.
        """
        if starts is not None and any(starts):
            raise UnsupportedError(
                f"PagedBatch.reserve: starts has value {list(starts)}, expected None or zeros; "
                "pad on the right"
            )
        counts = self._counts(new_lengths)
        known = self._checked_ids(counts, token_ids)
        super().reserve(new_lengths)
        self._may_pad = self._may_pad or None in self._records
        spans = []
        for record, count, ids in zip(self._records, counts, known, strict=True):
            if record is not None and count > 0:
                begin = record.length - count
                spans.append((record, begin, record.length))
                if ids is not None:
                    record.learn(begin, ids)
        self.pool._begin_step(Step(self._pending, spans))

    def ensure_reserved(
        self, layer_idx: int, new_lengths: int | Sequence[int], *, starts: Sequence[int] | None
    ) -> None:
        """Reserve for a caller who did not, when ``layer_idx`` begins a new step.

        Raises:
            ShapeError: a layer has not written the step before: it raised, another batch has the
                step, or a graph was replayed without `commit`. `reserve` itself does not ask.
            UnsupportedError: inside a compiled region, where lengths are not to be touched.
        """
        if not self._pending[layer_idx] and not torch.compiler.is_compiling():
            self.pool._settle()
            for row, record in enumerate(self._records):
                if record is not None and record.written < record.length:
                    raise ShapeError(
                        f"PagedBatch: row {row} has {record.written} of {record.length} positions "
                        "written by every layer, expected all before a new step; give all layers "
                        "the same batch, or truncate the sequence to where it was"
                    )
        super().ensure_reserved(layer_idx, new_lengths, starts=starts)

    def commit(self) -> None:
        """Say that all layers have written this step, where a replayed graph wrote for them.

        Until then the pages that replayed steps filled cannot be found by their tokens, and layers
        do not reserve for themselves. Layers that are called say it themselves.
        """
        self._pending[:] = [False] * self.num_layers

    def new_lengths(self, num_tokens: int) -> Tensor | None:
        """``[B]`` int32 new tokens of each row; None where each has all ``num_tokens`` of them."""
        return self._new_lengths if self._longest is not None else super().new_lengths(num_tokens)

    def view(self, layer_idx: int) -> CacheView:
        """What the ops read; stale once a table without ``max_length`` has grown."""
        self._check_layer("PagedBatch.view", layer_idx)
        config = self.configs[layer_idx]
        return CacheView(
            rows=self.pool.rows(layer_idx),
            page_table=self.page_table,
            lengths=self.lengths,
            starts=None,
            C=config.kv_lora_rank,
            R=config.qk_rope_head_dim,
            codec=self.codec,
            max_length=self.max_length if self._longest is None else self._longest,
            shard=self.pool.shard,
        )

    def reorder(self, indices: Sequence[int]) -> None:
        """Row b gets the contents of the former row ``indices[b]``, as beam search needs.

        Nothing is copied: the sequences keep their ids and share pages until they write.

        Raises:
            ShapeError: not B indices of rows, or an idle row on one side only; nothing has changed.
            CacheFull: a row passes the ``max_length`` of another batch; nothing has changed.
        """
        indices = list(indices)
        B, records = self.batch_size, self._records
        if (
            len(indices) != B
            or not all(0 <= index < B for index in indices)
            or any((records[b] is None) != (records[i] is None) for b, i in enumerate(indices))
        ):
            raise ShapeError(
                f"PagedBatch.reorder: indices has value {indices}, expected {B} numbers of "
                f"0 to {B - 1}, idle rows from idle rows"
            )
        self.pool._assign(
            [
                (record, source)
                for record, index in zip(records, indices, strict=True)
                if (source := records[index]) is not None and record is not None
            ]
        )

    def _counts(self, new_lengths: int | Sequence[int]) -> list[int]:
        counts = super()._counts(new_lengths)
        if isinstance(new_lengths, int):
            rows = zip(self._records, counts, strict=True)
            return [0 if record is None else count for record, count in rows]
        for row, (record, count) in enumerate(zip(self._records, counts, strict=True)):
            if record is None and count > 0:
                raise ShapeError(
                    f"PagedBatch.reserve: new_lengths has {count} tokens for row {row}, "
                    "expected 0 for an idle row"
                )
        return counts

    def _checked_ids(
        self, counts: list[int], token_ids: Sequence[Sequence[int] | Tensor | None] | None
    ) -> list[list[int] | None]:
        if token_ids is None:
            return [None] * self.batch_size
        name = "PagedBatch.reserve"
        known = [None if ids is None else checked_ids(name, ids) for ids in token_ids]
        have = [None if ids is None else len(ids) for ids in known]
        if len(have) != len(counts) or any(
            n is not None and n != count for n, count in zip(have, counts, strict=False)
        ):
            raise ShapeError(f"{name}: token_ids has {have} tokens, expected {counts} or None")
        return known

    def _check_fits(self, name: str, lengths: Sequence[int]) -> None:
        if self._longest is not None and max(lengths, default=0) > self._longest:
            raise CacheFull(
                f"{name}: max_length has value {self._longest}, "
                f"expected at least {max(lengths)}; nothing has changed"
            )

    def _check_follows(self, name: str, lengths: Mapping[CachedSequence, int]) -> None:
        """Raise CacheFull unless these sequences, where shown here, may get these lengths."""
        if self._longest is not None:
            self._check_fits(
                name, [lengths[r] for r in self._records if r is not None and r in lengths]
            )

    def _make_room(self, lengths: list[int]) -> None:
        growing = {
            record: length
            for record, length in zip(self._records, lengths, strict=True)
            if record is not None and length > record.length
        }
        self._write_table(self.pool._extend(growing, self))

    def _set_lengths(self, lengths: list[int]) -> None:
        self.pool._truncate(
            {
                record: length
                for record, length in zip(self._records, lengths, strict=True)
                if record is not None
            }
        )

    def _follow(self, first_columns: dict[CachedSequence, int]) -> None:
        """Show sequences whose pages changed from a column on; a step that was under way ends."""
        if not first_columns.keys().isdisjoint(self._records):
            self._write_table(first_columns)
            self._write_lengths()

    def _drop(self, records: set[CachedSequence]) -> None:
        """Rows of freed sequences become idle."""
        rows = [row for row, record in enumerate(self._records) if record in records]
        for row in rows:
            self._sequences[row] = self._records[row] = None
        if rows:
            self._write_lengths()

    def _write_lengths(self) -> None:
        super()._set_lengths([0 if record is None else record.length for record in self._records])

    def _write_table(self, first_columns: dict[CachedSequence, int]) -> None:
        """Write the pages from the first column on of each of these sequences."""
        entries = [
            (row, column, page)
            for row, record in enumerate(self._records)
            if record in first_columns
            for column, page in enumerate(
                record.pages[first_columns[record] :], first_columns[record]
            )
        ]
        if not entries:
            return
        self._widen(1 + max(column for _, column, _ in entries))
        row_idx, column, page = torch.tensor(entries).to(self.device, non_blocking=True).unbind(1)
        self.page_table[row_idx, column] = page.to(torch.int32)

    def _widen(self, columns: int) -> None:
        """A wider table where the width is not fixed: at least twice as wide each time."""
        B, M = self.page_table.shape
        if columns > M:
            wider = self.page_table.new_zeros(B, max(columns, 2 * M))
            wider[:, :M] = self.page_table
            self.page_table = wider

    def _check(self) -> None:
        """Verify that the device shows what the pool says.

        Raises:
            AssertionError: naming the row.
        """
        table, lengths = self.page_table.tolist(), self.lengths.tolist()
        for row, record in enumerate(self._records):
            length, pages = (0, []) if record is None else (record.length, record.pages)
            if not lengths[row] == self._host_lengths[row] == length:
                raise AssertionError(f"row {row} shows length {lengths[row]}, expected {length}")
            if table[row][: len(pages)] != pages:
                raise AssertionError(f"row {row} shows pages {table[row]}, expected {pages}")
