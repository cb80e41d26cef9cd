"""Which pages of a pool are in use, by how many sequences, and which can be found by a hash.

    free      nobody's; its contents are never read
    used      referred to by one sequence or more
    kept      nobody's, but full and findable by its hash until the pool needs the page

Host only: no tensor is touched here. Dims: P pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PageAllocator:
    """Reference counts of P pages, a list of the free ones, and the least recently kept first.

    Args:
        num_pages: P.
    """

    def __init__(self, num_pages: int) -> None:
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, page 0 on top
        self._kept: dict[int, None] = {}  # in the order of eviction
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._discarded: list[int] = []

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that nobody uses and that can still be found."""
        return len(self._kept)

    def references(self, page: int) -> int:
        """How many sequences use ``page``."""
        return self._references[page]

    def take(self) -> int:
        """A page for one sequence; evicts the page that was kept longest when none is free."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._kept))
            del self._kept[page]
            self.forget(page)
            self._discarded.append(page)
        self._references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence uses each of ``pages``, which are used or kept."""
        for page in pages:
            if self._references[page] == 0:
                del self._kept[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One sequence less uses each of ``pages``; of those then kept the last is evicted first.

        A page is found only through the ones before it, so its evicted tail costs least.
        """
        for page in reversed(pages):
            if self._references[page] < 1:
                raise AssertionError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if self._references[page] > 0:
                continue
            if page in self._hash_of:
                self._kept[page] = None
            else:
                self._free.append(page)
                self._discarded.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let ``page`` be found by ``digest``, unless another page has it already."""
        if digest not in self._page_of and page not in self._hash_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def forget(self, page: int) -> None:
        """``page`` is no longer found: its rows are about to change."""
        digest = self._hash_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def find(self, digest: bytes) -> int | None:
        """The page published under ``digest``."""
        return self._page_of.get(digest)

    def digest(self, page: int) -> bytes | None:
        """What ``page`` is found by."""
        return self._hash_of.get(page)

    def forget_kept(self) -> None:
        """Free every page that nobody uses and make the used ones impossible to find."""
        for page in list(self._hash_of):
            self.forget(page)
        self._discarded += self._kept
        self._free += self._kept
        self._kept.clear()

    def drain_discarded(self) -> list[int]:
        """Pages whose contents became nobody's since the last call, each once, in any order."""
        pages = list(dict.fromkeys(self._discarded))
        self._discarded.clear()
        return pages

    def check(self, references: list[int]) -> None:
        """Verify the books against the ``references`` counted from outside.

        Raises:
            AssertionError: naming the page.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError(f"pages are free twice: {sorted(self._free)}")
        for page, (have, want) in enumerate(zip(self._references, references, strict=True)):
            if have != want:
                raise AssertionError(f"page {page} counts {have} users, {want} use it")
            if (have == 0) != ((page in free) != (page in self._kept)) or (
                have > 0 and (page in free or page in self._kept)
            ):
                raise AssertionError(f"page {page} is not just one of free, used and kept")
        for page, digest in self._hash_of.items():
            if self._page_of.get(digest) != page or page in free:
                raise AssertionError(f"page {page} is not the one that its hash finds")
        if (
            len(self._page_of) != len(self._hash_of)
            or not self._kept.keys() <= self._hash_of.keys()
        ):
            raise AssertionError("a page is kept without a hash, or a hash without a page")
