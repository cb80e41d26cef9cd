"""A pool of pages that many sequences share, and the operations on sequences.

Dims: P pages in the pool, Z positions in one page, W stored row width.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from mla.cache.base import CacheFull, checked_dtype
from mla.cache.batch import PagedBatch
from mla.cache.pages import PageAllocator
from mla.cache.prefix import CachedSequence, Step, checked_ids, prefix_digests, root_digest
from mla.checks import ShapeError
from mla.codec import Codec, PlainCodec
from mla.config import MLAConfig
from mla.view import check_shard


class PagedLatentCache:
    """A pool of ``[P, Z, W]`` rows in each layer, shared by sequences of any length.

        pool = PagedLatentCache(config, num_pages=1000, num_layers=len(layers))
        chat = pool.allocate(prompt_ids)          # finds pages that hold the same first tokens
        rest = prompt_ids[pool.length(chat):]     # what is still to be computed, never empty
        cache = pool.batch([chat])                # the same one for all layers and steps
        hidden = embed(rest)[None]
        for layer in layers:
            hidden = layer(hidden, cache=cache)

    A sequence is an id that `allocate` or `fork` returned; a `batch` of them goes to the layers.
    Sequences share pages after `fork`, after `PagedBatch.reorder` and through their token ids; a
    shared page is copied before it is written. Full pages whose token ids are known are found by
    later sequences that begin with the same tokens, also after `free`, until the pool needs them:
    it takes those first that have been nobody's longest.

    Every operation works completely or raises and changes nothing. The books are kept on the host;
    not for use from several threads at once, nor between the layers of a step: a step whose
    sequence is truncated or freed has to be reserved anew. After an exception between layers
    truncate the sequences of the batch to where they were.

    Args:
        config: of all layers, or a sequence with one for each layer.
        num_pages: P, fixed; one page takes ``nbytes / P`` bytes.
        page_size: Z.
        shard: (index, count) of a pool cut over the ranks of a group: each keeps every count-th
            page of each sequence. Do the same on all ranks, whose books are then the same.
        num_layers: when one config serves all layers.
        codec: how rows are stored; None: plain values.
        scrub_on_free: zero the rows of a page, in all layers, when no sequence can come to them any
            more, so that a wrong page table cannot show them; pages kept for their tokens stay.
        device, dtype: of the rows (dtype for the plain codec only); None: PyTorch's defaults.

    Raises:
        ShapeError: a size is not positive.
    """

    _next_id = itertools.count()  # ids are never used twice: those of another pool are refused

    def __init__(
        self,
        config: MLAConfig | Sequence[MLAConfig],
        *,
        num_pages: int,
        page_size: int = 64,
        shard: tuple[int, int] = (0, 1),
        num_layers: int = 1,
        codec: Codec | None = None,
        scrub_on_free: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        configs = [config] * num_layers if isinstance(config, MLAConfig) else list(config)
        if min(num_pages, page_size, len(configs)) < 1 or num_pages >= 2**31:
            raise ShapeError(
                f"PagedLatentCache: num_pages, page_size, layers have values {num_pages}, "
                f"{page_size}, {len(configs)}, expected at least 1 of each and int32 page numbers"
            )
        self.configs, self.codec = tuple(configs), codec or PlainCodec()
        self.dtype = checked_dtype("PagedLatentCache", dtype)
        check_shard("PagedLatentCache", shard)
        self.page_size, self.shard, self.scrub_on_free = page_size, shard, scrub_on_free
        self.span = page_size * shard[1]  # positions of a page of every shard: one column of tables
        self._rows = [
            torch.empty(
                num_pages,
                page_size,
                self.codec.row_width(layer.kv_lora_rank, layer.qk_rope_head_dim),
                dtype=self.codec.storage_dtype(self.dtype),
                device=device,
            )
            for layer in configs
        ]
        self._pages = PageAllocator(num_pages)
        self._records: dict[int, CachedSequence] = {}
        self._steps: list[Step] = []
        self._batches: WeakSet[PagedBatch] = WeakSet()

    @property
    def device(self) -> torch.device:
        return self._rows[0].device

    @property
    def num_layers(self) -> int:
        return len(self.configs)

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that can be taken now, those included that are only kept to be found again."""
        return self._pages.num_available

    @property
    def nbytes(self) -> int:
        """Bytes of storage, all layers together."""
        return sum(rows.nbytes for rows in self._rows)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Ids of the allocated sequences, oldest first."""
        return tuple(self._records)

    def length(self, sequence: int) -> int:
        """Positions of ``sequence`` that are cached or reserved."""
        return self._record("PagedLatentCache.length", sequence).length

    def rows(self, layer_idx: int) -> Tensor:
        """``[P, Z, W]`` storage of one layer, not a copy."""
        if not 0 <= layer_idx < self.num_layers:
            raise ShapeError(
                f"PagedLatentCache.rows: layer_idx has value {layer_idx}, "
                f"expected 0 to {self.num_layers - 1}"
            )
        return self._rows[layer_idx]

    def allocate(self, token_ids: Sequence[int] | Tensor | None = None, *, salt: str = "") -> int:
        """A new sequence, which begins with the longest stretch of ``token_ids`` that is cached.

        Only full pages are found, and at least one token is left to be computed. The caller then
        appends the tokens behind `length`, in one step or several; no further ids are needed for
        them. No page is taken yet.

        Args:
            token_ids: of the prompt, integers; None: neither look for pages nor let them be found.
            salt: what else the rows depend on, such as the adapter or the image in the prompt; only
                sequences with the same salt share pages by their tokens.

        Returns:
            The id, never used before.

        Raises:
            ShapeError: ``token_ids`` is not one row of integers.
        """
        ids = [] if token_ids is None else checked_ids("PagedLatentCache.allocate", token_ids)
        self._settle()
        record = CachedSequence(root=root_digest(salt), token_ids=ids)
        for digest in prefix_digests(record.root, ids[:-1], self.span):
            page = self._pages.find(digest)
            if page is None:
                break
            self._pages.share([page])
            record.pages.append(page)
            record.digests.append(digest)
        record.length = record.written = len(record.pages) * self.span
        return self._register(record)

    def fork(self, sequence: int) -> int:
        """A new sequence with the contents of ``sequence``, whose pages both share.

        Raises:
            ShapeError: ``sequence`` is not allocated.
        """
        record = self._record("PagedLatentCache.fork", sequence)
        self._settle()
        self._pages.share(record.pages)
        return self._register(record.copy())

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions from ``length`` on, for rejected speculative tokens.

        Their token ids are forgotten too: pass those of the tokens that follow to
        `PagedBatch.reserve`.

        Raises:
            ShapeError: ``sequence`` is not allocated, or is shorter; nothing has changed.
        """
        record = self._record("PagedLatentCache.truncate", sequence)
        if not 0 <= length <= record.length:
            raise ShapeError(
                f"PagedLatentCache.truncate: length has value {length}, "
                f"expected 0 to {record.length}"
            )
        self._truncate({record: length})

    def free(self, *sequences: int) -> None:
        """Give the pages of ``sequences`` back; their rows in batches become idle.

        Raises:
            ShapeError: one is not allocated or occurs twice; nothing has changed.
        """
        name = "PagedLatentCache.free"
        records = {self._record(name, sequence) for sequence in sequences}
        if len(records) != len(sequences):
            raise ShapeError(f"{name}: sequences has value {sequences}, expected each once")
        self._settle()
        self._forget_steps(records)
        for sequence in sequences:
            self._pages.release(self._records.pop(sequence).pages)
        self._scrub()
        for batch in self._batches:
            batch._drop(records)

    def reset(self) -> None:
        """Free all sequences and forget which tokens the pages hold; the storage stays."""
        self.free(*self._records)
        self._pages.forget_kept()
        self._scrub()

    def batch(
        self, sequences: Sequence[int | None], *, max_length: int | None = None
    ) -> PagedBatch:
        """These sequences as the rows of a cache that the layer takes.

        Args:
            sequences: B ids that differ; None: an idle row, see `PagedBatch`.
            max_length: longest row, for CUDA graphs and compiled steps; None: the page table grows
                with its rows.

        Raises:
            ShapeError: an id is not allocated or occurs twice, or there is none.
            CacheFull: a sequence is longer than ``max_length``.
        """
        batch = PagedBatch(self, sequences, max_length)
        self._batches.add(batch)
        return batch

    def check(self) -> None:
        """Verify every invariant of the books and of the tables on the device; reads them back.

        Raises:
            AssertionError: naming what is wrong.
        """
        references = [0] * self.num_pages
        for sequence, record in self._records.items():
            record.check(sequence, self.span)
            for page in record.pages:
                references[page] += 1
            for page, digest in zip(record.pages, record.digests, strict=False):
                if self._pages.digest(page) not in (None, digest):
                    raise AssertionError(f"page {page} is found by other tokens than it holds")
        self._pages.check(references)
        for batch in self._batches:
            batch._check()

    def _record(self, name: str, sequence: int) -> CachedSequence:
        record = self._records.get(sequence)
        if record is None:
            raise ShapeError(
                f"{name}: sequence has value {sequence!r}, expected an id that this pool allocated "
                "and has not freed"
            )
        return record

    def _register(self, record: CachedSequence) -> int:
        sequence = next(self._next_id)
        self._records[sequence] = record
        return sequence

    def _extend(
        self, lengths: Mapping[CachedSequence, int], batch: PagedBatch
    ) -> dict[CachedSequence, int]:
        """Pages for these new lengths, or CacheFull and no change.

        Copies the pages that are shared and about to be written. Shows the change to all batches
        but ``batch``; returns the first changed column of each sequence whose pages changed.
        """
        for other in self._batches:
            other._check_follows("PagedBatch.reserve", lengths)
        self._settle()
        needed = self._pages_needed(lengths)
        if needed > self.num_free_pages:
            raise CacheFull(
                f"PagedLatentCache: the step has a need of {needed} pages, expected at most the "
                f"{self.num_free_pages} free ones of {self.num_pages}; nothing has changed",
                needed=needed,
                free=self.num_free_pages,
            )
        self._forget_steps(lengths.keys())
        copies, first_columns = [], {}
        for record, length in lengths.items():
            column, slot = divmod(record.length, self.span)
            num_new = -(-length // self.span) - len(record.pages)
            if num_new > 0:
                first_columns[record] = len(record.pages)
                record.pages += [self._pages.take() for _ in range(num_new)]
            if slot > 0 and self._pages.references(record.pages[column]) > 1:
                copies.append((record.pages[column], self._pages.take()))
                self._pages.release([record.pages[column]])
                record.pages[column] = copies[-1][1]
                first_columns[record] = column
            elif slot > 0:
                self._pages.forget(record.pages[column])
            record.length = length
        self._scrub()
        self._copy(copies)
        if others := [other for other in self._batches if other is not batch]:
            self._announce({r: first_columns.get(r, len(r.pages)) for r in lengths}, others)
        return first_columns

    def _pages_needed(self, lengths: Mapping[CachedSequence, int]) -> int:
        """Pages for the new positions, and for the copies of shared pages that are written."""
        Z, needed = self.span, 0
        writers: Counter[int] = Counter()
        for record, length in lengths.items():
            needed += -(-length // Z) - len(record.pages)
            if record.length % Z > 0 and self._pages.references(record.pages[-1]) > 1:
                writers[record.pages[-1]] += 1
        for page, num_writers in writers.items():  # the last of its users needs no copy
            needed += min(num_writers, self._pages.references(page) - 1)
        return needed

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy pages as they are stored, in all layers."""
        if copies:
            source, target = torch.tensor(copies).to(self.device, non_blocking=True).unbind(1)
            for rows in self._rows:
                rows[target] = rows[source]

    def _scrub(self) -> None:
        """Zero what became nobody's."""
        discarded = self._pages.drain_discarded()
        if discarded and self.scrub_on_free:
            pages = torch.tensor(discarded).to(self.device, non_blocking=True)
            for rows in self._rows:
                rows[pages] = 0

    def _truncate(self, lengths: Mapping[CachedSequence, int]) -> None:
        self._settle()
        self._forget_steps(lengths.keys())
        for record, length in lengths.items():
            self._pages.release(record.cut(length, self.span))
        self._scrub()
        self._announce({record: len(record.pages) for record in lengths})

    def _assign(self, sources: Sequence[tuple[CachedSequence, CachedSequence]]) -> None:
        """Give each first sequence the contents that the second one has now."""
        lengths = {record: source.length for record, source in sources}
        for batch in self._batches:
            batch._check_follows("PagedBatch.reorder", lengths)
        self._settle()
        copies = [(record, source.copy()) for record, source in sources]
        self._forget_steps({record for record, _ in copies})
        for _, copy in copies:
            self._pages.share(copy.pages)
        for record, copy in copies:
            self._pages.release(record.pages)
            record.become(copy)
        self._scrub()
        self._announce({record: 0 for record, _ in copies})

    def _announce(
        self,
        first_columns: dict[CachedSequence, int],
        batches: Iterable[PagedBatch] | None = None,
    ) -> None:
        """Show sequences whose length, or pages from a column on, have changed."""
        for batch in self._batches if batches is None else batches:
            batch._follow(first_columns)

    def _begin_step(self, step: Step) -> None:
        if step.spans:
            self._steps.append(step)

    def _forget_steps(self, records: Iterable[CachedSequence]) -> None:
        """Steps of these sequences that are not finished never will be."""
        gone = set(records)
        self._steps = [
            step for step in self._steps if gone.isdisjoint(record for record, _, _ in step.spans)
        ]

    def _settle(self) -> None:
        """Let the pages that finished steps have filled be found."""
        finished = [step for step in self._steps if not any(step.pending)]
        if finished:
            self._steps = [step for step in self._steps if any(step.pending)]
        for record, begin, end in itertools.chain.from_iterable(step.spans for step in finished):
            record.finish(begin, end)
            if record.has_new_digests(self.span):
                for page, digest in record.new_digests(self.span):
                    self._pages.publish(page, digest)
