"""Free pages and reference counts, and which pages the prefix cache alone holds."""

from __future__ import annotations

from array import array
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray


class Pages:
    """The pages [first, count). The lowest free page goes first, so slots stay together.

    Attributes:
        free: pages that nobody holds, a heap.
        references: of each page: the sequences that hold it, and one more for the prefix cache.
        shared: the same numbers, i32[P], as NumPy has them.
        num_idle: pages that the prefix cache holds and no sequence.
    """

    def __init__(self, first: int, count: int) -> None:
        self.free = list(range(first, count))
        self.references = array("i", [0]) * count
        self.shared: NDArray[np.int32] = np.frombuffer(self.references, dtype=np.int32)
        self._cached = bytearray(count)
        self.num_idle = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self.free)

    def has(self, page: int) -> bool:
        """Whether it is one of these, and not of the host."""
        return page < len(self.references)

    def take(self) -> int:
        """A free page, with one reference."""
        page = heappop(self.free)
        self.references[page] = 1
        return page

    def take_each(self, count: int) -> list[int]:
        """So many free pages, with one reference each."""
        free, references = self.free, self.references
        pages = [heappop(free) for _ in range(count)]
        for page in pages:
            references[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """One more sequence holds a page that somebody holds."""
        self.num_idle -= self.is_idle(page)
        self.references[page] += 1

    def drop(self, page: int) -> None:
        """A sequence lets go of a page."""
        self.references[page] -= 1
        self.num_idle += self.is_idle(page)
        if self.references[page] == 0:
            heappush(self.free, page)

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
