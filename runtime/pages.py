"""Free pages and reference counts, and which pages the prefix cache alone holds."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

_WINDOW = 256  # pages that are looked at together


class Pages:
    """The pages [first, count). The lowest free page goes first, so slots stay together.

    Attributes:
        num_free: how many nobody holds.
        references: of each page: the sequences that hold it, and one more for the prefix cache.
        shared: the same numbers, i32[P], as NumPy has them.
        num_idle: pages that the prefix cache holds and no sequence.
    """

    def __init__(self, first: int, count: int) -> None:
        self.num_free = count - first
        # Which are free, a byte each: a heap of so many is cold memory when a step comes to it.
        self._free = bytearray(first) + bytearray(b"\1") * (count - first)
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._free, dtype=np.uint8)
        self._next: list[int] = []  # the free pages below _looked, the lowest one last
        self._looked = first
        self.references = array("i", [0]) * count
        self.shared: NDArray[np.int32] = np.frombuffer(self.references, dtype=np.int32)
        self._cached = bytearray(count)
        self.num_idle = 0

    def has(self, page: int) -> bool:
        """Whether it is one of these, and not of the host."""
        return page < len(self.references)

    def take(self) -> int:
        """A free page, of which there is one, with one reference."""
        if not self._next:
            self._look()
        page = self._next.pop()
        self.num_free -= 1
        self._free[page] = 0
        self.references[page] = 1
        return page

    def take_each(self, count: int) -> list[int]:
        """So many free pages, of which there are as many, with one reference each."""
        taken: list[int] = []
        while len(taken) < count:
            if not self._next:
                self._look()
            some = self._next[len(taken) - count :]
            del self._next[-len(some) :]
            taken += reversed(some)
        free, references = self._free, self.references
        self.num_free -= count
        for page in taken:
            free[page] = 0
            references[page] = 1
        return taken

    def _look(self) -> None:
        start, size = self._looked, _WINDOW
        while True:
            assert start < len(self._free), "no page is free"
            (found,) = self._bytes[start : start + size].nonzero()
            if len(found):
                break
            start, size = start + size, 4 * size
        self._next = (found[::-1] + start).tolist()
        self._looked = start + size

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
            if page < self._looked:  # all from the lowest one on are looked for again
                self._looked = min(page, self._next[-1]) if self._next else page
                self._next = []

    def is_idle(self, page: int) -> bool:
        """Whether the prefix cache holds it, and nobody else."""
        return self._cached[page] == 1 and self.references[page] == 1

    def frees(self, page: int) -> bool:
        """Whether it is available once one of the sequences that hold it lets go of it."""
        return self.references[page] - self._cached[page] == 1

    def cache(self, page: int) -> None:
        """The prefix cache holds a page from now on, beside the sequences that do."""
        assert not self._cached[page] and self.references[page]
        self._cached[page] = 1
        self.references[page] += 1

    def uncache(self, page: int) -> None:
        """The prefix cache lets go of a page."""
        self.num_idle -= self.is_idle(page)
        self._cached[page] = 0
        self.drop(page)
