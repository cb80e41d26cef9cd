"""One cached sequence: its pages, its length, and the hashes of the tokens in its full pages.

    digest[0]   = H(salt)
    digest[i+1] = H(digest[i], token ids of page i)

A page is found by the digest of everything up to its end, so equal digests mean equal tokens at
equal positions under the same salt. Latents are never hashed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from operator import index
from typing import NamedTuple

from torch import Tensor

from mla.checks import ShapeError


def root_digest(salt: str) -> bytes:
    """The digest before the first page."""
    return sha256(b"mla:" + salt.encode()).digest()


def page_digest(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest after one more full page."""
    return sha256(previous + struct.pack(f"<{len(token_ids)}q", *token_ids)).digest()


def prefix_digests(root: bytes, token_ids: Sequence[int], page_size: int) -> Iterator[bytes]:
    """Digests after each full page of ``token_ids``."""
    digest = root
    for first in range(0, len(token_ids) - page_size + 1, page_size):
        digest = page_digest(digest, token_ids[first : first + page_size])
        yield digest


def checked_ids(name: str, token_ids: Sequence[int] | Tensor) -> list[int]:
    """``token_ids`` as a list of numbers that fit 64 bits.

    Raises:
        ShapeError: not one row of integers.
    """
    if isinstance(token_ids, Tensor):
        if token_ids.ndim != 1 or token_ids.is_floating_point():
            raise ShapeError(
                f"{name}: token_ids has shape {tuple(token_ids.shape)} and dtype "
                f"{token_ids.dtype}, expected [length] integers"
            )
        return [int(token) for token in token_ids.tolist()]
    try:
        ids = [index(token) for token in token_ids]
        struct.pack(f"<{len(ids)}q", *ids)
    except (TypeError, struct.error):
        raise ShapeError(
            f"{name}: token_ids has value {token_ids}, expected 64-bit integers"
        ) from None
    return ids


@dataclass(eq=False)
class CachedSequence:
    """Host record of one sequence.

    Attributes:
        root: digest before the first page.
        pages: one page for each begun stretch of ``page_size`` positions.
        length: positions reserved so far.
        written: positions from 0 that every layer has written; less than ``length`` during a step,
            and for good after one that was given up and not taken back.
        token_ids: of the positions from 0 as far as the caller told without a gap, which may be
            further than ``length``.
        digests: after each full page that was hashed so far.
    """

    root: bytes
    pages: list[int] = field(default_factory=list)
    length: int = 0
    written: int = 0
    token_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def copy(self) -> CachedSequence:
        """An equal record of its own; the pages gain a user."""
        return CachedSequence(
            root=self.root,
            pages=list(self.pages),
            length=self.length,
            written=self.written,
            token_ids=list(self.token_ids),
            digests=list(self.digests),
        )

    def become(self, other: CachedSequence) -> None:
        """Take over all fields of ``other``."""
        vars(self).update(vars(other))

    def learn(self, begin: int, token_ids: Sequence[int]) -> None:
        """Take the ids of the positions from ``begin`` on, unless those before are unknown."""
        known = self.token_ids
        if len(known) >= begin and known[begin : begin + len(token_ids)] != list(token_ids):
            known[begin:] = token_ids

    def finish(self, begin: int, end: int) -> None:
        """Every layer has written the positions ``[begin, end)``."""
        if self.written == begin and self.length >= end:
            self.written = end

    def cut(self, length: int, page_size: int) -> list[int]:
        """Forget everything from ``length`` on; the pages that are no longer needed."""
        num_pages = -(-length // page_size)
        dropped = self.pages[num_pages:]
        del self.pages[num_pages:], self.token_ids[length:], self.digests[length // page_size :]
        self.length, self.written = length, min(self.written, length)
        return dropped

    def has_new_digests(self, page_size: int) -> bool:
        """Whether `new_digests` gives any."""
        return min(self.written, len(self.token_ids)) >= (len(self.digests) + 1) * page_size

    def new_digests(self, page_size: int) -> Iterator[tuple[int, bytes]]:
        """Pages that are full, written and known since the last call, with their digests."""
        known = min(self.written, len(self.token_ids)) // page_size
        for column in range(len(self.digests), known):
            previous = self.digests[-1] if self.digests else self.root
            ids = self.token_ids[column * page_size : (column + 1) * page_size]
            self.digests.append(page_digest(previous, ids))
            yield self.pages[column], self.digests[-1]

    def check(self, name: object, page_size: int) -> None:
        """Verify the record against itself.

        Raises:
            AssertionError: naming the sequence.
        """
        if len(self.pages) != -(-self.length // page_size):
            raise AssertionError(
                f"sequence {name} of length {self.length} has {len(self.pages)} pages"
            )
        if not 0 <= self.written <= self.length:
            raise AssertionError(
                f"sequence {name} of length {self.length} has {self.written} written positions"
            )
        known = min(self.written, len(self.token_ids))
        digests = list(prefix_digests(self.root, self.token_ids[:known], page_size))
        if self.digests != digests[: len(self.digests)]:
            raise AssertionError(f"sequence {name} has digests of other tokens than its own")


class Step(NamedTuple):
    """Positions ``[begin, end)`` that were reserved together.

    Attributes:
        pending: for each layer whether it has not written them yet; shared with the batch.
        spans: (sequence, begin, end).
    """

    pending: list[bool]
    spans: list[tuple[CachedSequence, int, int]]
