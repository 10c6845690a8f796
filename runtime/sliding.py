"""What a sequence keeps that sees a sliding window, and its first tokens beside it."""

from __future__ import annotations

from dataclasses import dataclass

ENDLESS = 1 << 40
"""Tokens of a sequence that has no end: more than anybody computes."""

_LEAST_CHUNK, _MOST_CHUNK = 256, 2048


@dataclass(frozen=True, slots=True)
class Sliding:
    """Which pages of a sequence are still seen.

    Attributes:
        page_size: tokens a page.
        window: the latest tokens that a token sees, itself included.
        sinks: first tokens that all see.
        chunk: the most tokens that are computed at once, so that what a sequence holds has a bound.
    """

    page_size: int
    window: int
    sinks: int
    chunk: int

    @classmethod
    def of(cls, page_size: int, window: int, sinks: int) -> Sliding:
        """With chunks of the window's length, 256 to 2048: not many more pages than are seen, and
        products long enough.
        """
        return cls(page_size, window, sinks, min(max(window, _LEAST_CHUNK), _MOST_CHUNK))

    @property
    def sink_pages(self) -> int:
        """The first pages, which stay."""
        return -(-self.sinks // self.page_size)

    @property
    def most_pages(self) -> int:
        """Pages that a sequence holds at most: the first, the window's and a chunk's, one of them
        cut at both ends.
        """
        return self.sink_pages + -(-(self.window + self.chunk - 1) // self.page_size) + 1

    def first_seen(self, length: int) -> int:
        """Behind the first pages, the first that tokens from `length` on see: its number in the
        sequence.
        """
        return max(self.sink_pages, (length - self.window + 1) // self.page_size)
