"""Free pages and reference counts, and which pages the prefix cache alone holds."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

_WINDOW = 256  # pages that are looked at together
_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


class Pages:
    """The pages [first, count). The lowest free page goes first, so slots stay together.

    Attributes:
        count: of all, those before `first` among them.
        num_free: how many nobody holds.
        references: of each page: the sequences that hold it, and one more for the prefix cache.
        shared: the same numbers, i32[P], as NumPy has them.
        num_idle: pages that the prefix cache holds and no sequence.
    """

    def __init__(self, first: int, count: int) -> None:
        self.count, self.num_free = count, count - first
        # Which are free, a byte each: a heap of so many is cold memory when a step comes to it.
        self._free = bytearray(first) + bytearray(b"\1") * (count - first)
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._free, dtype=np.uint8)
        self._next = _NONE  # from _at on the free pages below _looked, rising
        self._at, self._looked = 0, first
        self.references = array("i", [0]) * count
        self.shared: NDArray[np.int32] = np.frombuffer(self.references, dtype=np.int32)
        self._cached = bytearray(count)
        self._holds: NDArray[np.uint8] = np.frombuffer(self._cached, dtype=np.uint8)
        self.num_idle = 0

    def has(self, page: int) -> bool:
        """Whether it is one of these, and not of the host."""
        return page < len(self.references)

    def take(self) -> int:
        """A free page, of which there is one, with one reference."""
        if self._at == len(self._next):
            self._look()
        page = int(self._next[self._at])
        self._at += 1
        self.num_free -= 1
        self._free[page] = 0
        self.references[page] = 1
        return page

    def take_each(self, count: int) -> list[int]:
        """So many free pages, of which there are as many, with one reference each."""
        taken: list[int] = self.take_array(count).tolist()
        return taken

    def take_array(self, count: int) -> NDArray[np.int64]:
        """`take_each`, as i64[count]."""
        while len(self._next) - self._at < count:
            self._look()
        taken = self._next[self._at : self._at + count]
        self._at += count
        self.num_free -= count
        self._bytes[taken] = 0
        self.shared[taken] = 1
        return taken

    def _look(self) -> None:
        """Some more of the free pages, behind those that are known."""
        start, size = self._looked, _WINDOW
        while True:
            assert start < len(self._free), "no page is free"
            (found,) = self._bytes[start : start + size].nonzero()
            if len(found):
                break
            start, size = start + size, 4 * size
        self._next = np.concatenate([self._next[self._at :], found + start])
        self._at, self._looked = 0, start + size

    def hold(self, page: int) -> None:
        """One more sequence holds a page that somebody holds."""
        self.num_idle -= self.is_idle(page)
        self.references[page] += 1

    def drop(self, page: int) -> None:
        """A sequence lets go of a page."""
        self.references[page] -= 1
        self.num_idle += self.is_idle(page)
        if self.references[page] == 0:
            self._free[page] = 1
            self.num_free += 1
            self._look_again(page)

    def _look_again(self, page: int) -> None:
        """All free pages from the lowest one on are looked for again, as this one is free now."""
        if page < self._looked:
            known = self._at < len(self._next)
            self._looked = min(page, int(self._next[self._at])) if known else page
            self._next, self._at = _NONE, 0

    def drop_each(self, pages: list[int]) -> None:
        """`drop` of each of several pages, which are all different."""
        if not pages:
            return
        found = np.array(pages, dtype=np.int64)
        self.shared[found] -= 1
        left, cached = self.shared[found], self._holds[found]
        self.num_idle += int(np.count_nonzero((left == 1) & (cached == 1)))
        free = found[left == 0]
        if len(free):
            self._bytes[free] = 1
            self.num_free += len(free)
            self._look_again(int(free.min()))

    def is_idle(self, page: int) -> bool:
        """Whether the prefix cache holds it, and nobody else."""
        return self._cached[page] == 1 and self.references[page] == 1

    def frees(self, page: int) -> bool:
        """Whether it is available once one of the sequences that hold it lets go of it."""
        return self.references[page] - self._cached[page] == 1

    def cache_each(self, pages: list[int]) -> None:
        """The prefix cache holds pages from now on: all different, and held by sequences."""
        if not pages:
            return
        found = np.array(pages, dtype=np.int64)
        assert not self._holds[found].any() and self.shared[found].all()
        self._holds[found] = 1
        self.shared[found] += 1

    def uncache_idle(self, pages: list[int]) -> None:
        """`uncache` of pages that are idle: all of them are free then."""
        if not pages:
            return
        found = np.array(pages, dtype=np.int64)
        self._holds[found] = 0
        self.shared[found] = 0
        self._bytes[found] = 1
        self.num_idle -= len(pages)
        self.num_free += len(pages)
        self._look_again(min(pages))

    def uncache(self, page: int) -> None:
        """The prefix cache lets go of a page."""
        self.num_idle -= self.is_idle(page)
        self._cached[page] = 0
        self.drop(page)
