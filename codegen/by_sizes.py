"""What kernels work out from the values of symbols, remembered from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class BySizes(Generic[T]):
    """What is made of the symbols' values, for the last ones that it was asked for: the steps of a
    decode mostly have those of the step before, and the layers of a run all have the same. Threads
    may share it.

    Args:
        make: makes it, of the values alone.
    """

    def __init__(self, make: Callable[[Mapping[str, int]], T]) -> None:
        self.make = make
        self._known: tuple[Mapping[str, int], T] | None = None

    def at(self, sizes: Mapping[str, int]) -> T:
        """What belongs to these values."""
        known = self._known  # read once: another thread may set it
        if known is None or known[0] != sizes:
            known = self._known = (dict(sizes), self.make(sizes))
        return known[1]
