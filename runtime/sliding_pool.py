"""A paged pool whose sequences let go of pages between their first ones and their window, so that
each holds a bounded number of them however long it gets (StreamingLLM, Xiao et al., 2309.17453).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

from .pool import PageCopy, PagedPool, Slots
from .sliding import ENDLESS, Sliding


class SlidingPool(PagedPool):
    """Pages of what is seen. A sequence lets go of others when it needs a new one: their tokens are
    behind the window of its next token, and so of all to come. Later pages move up in its table.

    Args:
        num_pages: the reserved one included.
        sliding: what of a sequence is seen.
        prefix_caching, host_pages, clock: as ``PagedPool`` has them. Prefixes may be longer than
            the window: who begins with one takes all of its pages, and lets go of most at once.

    Attributes:
        num_dropped: pages that sequences have let go of since they saw them last.

    Raises:
        UsageError: as ``PagedPool``.
    """

    slides = True

    def __init__(
        self,
        num_pages: int,
        sliding: Sliding,
        *,
        prefix_caching: bool = False,
        host_pages: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            num_pages,
            sliding.page_size,
            prefix_caching=prefix_caching,
            host_pages=host_pages,
            clock=clock,
        )
        self.max_append = sliding.chunk
        self.num_dropped = 0
        self._sliding = sliding
        # Lengths are those in the tables, so that all else is as in a pool that keeps everything.
        self._gaps: dict[int, int] = {}

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits into the empty pool, in tokens."""
        whole = self.num_pages - self._first_page >= self._sliding.most_pages
        return ENDLESS if whole else super().max_tokens

    def most_pages(self, num_tokens: int) -> int:
        """Pages that a sequence of so many tokens holds at most, at any time."""
        return min(super().most_pages(num_tokens), self._sliding.most_pages)

    def pages_to_open(self, tokens: Sequence[int], namespace: Hashable) -> int:
        """Available pages that `reuse` of these tokens and the `append` of the rest would take at
        most: what others hold of a long prefix may be what is let go of.
        """
        most = self.most_pages(len(tokens))
        whole = most == super().most_pages(len(tokens))
        return super().pages_to_open(tokens, namespace) if whole else most

    def reuse(
        self, seq: int, tokens: Sequence[int], namespace: Hashable
    ) -> tuple[int, list[PageCopy]]:
        """Opens `seq` on the longest cached prefix of `tokens`, never all of them: how many there
        are, and the copies to make first.
        """
        found = super().reuse(seq, tokens, namespace)
        self._drop_behind(seq)
        return found

    def keep(
        self, seq: int, tokens: Sequence[int], namespace: Hashable, *, closing: bool = False
    ) -> None:
        """Caches the full pages of `tokens`, if those that `seq` has let go of still are."""
        if self._cache is not None:
            first = self._sliding.sink_pages
            gap = range(first, first + self.gap(seq) // self.page_size)
            self._cache.keep(namespace, tokens, self._held[seq], gap, closing=closing)

    def length(self, seq: int) -> int:
        """Tokens that `seq` has had."""
        return super().length(seq) + self.gap(seq)

    def gap(self, seq: int) -> int:
        """Tokens of `seq` that its block table leaves out."""
        return self._gaps.get(seq, 0)

    def drops(self, seq: int, num_tokens: int) -> bool:
        """Whether `append(seq, num_tokens)` would let go of pages of `seq`."""
        return bool(super().pages_needed(seq, num_tokens) and self._behind(seq))

    def pages_needed(self, seq: int, num_tokens: int) -> int:
        """Available pages that `append` of so many tokens, in as many parts as it takes, needs."""
        new = super().pages_needed(seq, num_tokens)
        if not new:
            return 0
        if num_tokens > self.max_append:
            return max(0, min(new, self._sliding.most_pages - len(self._held[seq])))
        return max(0, new - sum(map(self._pages.frees, self._behind(seq))))

    def append(self, seq: int, num_tokens: int) -> tuple[Slots, list[PageCopy]]:
        """Finds places for the next tokens, `max_append` at most: their slots, and the copies to
        make first. What they do not see makes room, where they need more.

        Raises:
            CapacityError: there are not enough pages; nothing that is seen has changed.
        """
        assert num_tokens <= self.max_append
        if super().pages_needed(seq, num_tokens):
            self._drop_behind(seq)
        return super().append(seq, num_tokens)

    def _pages_to_go_on(self, seqs: list[int]) -> int:
        return sum([self.pages_needed(seq, 1) for seq in seqs])

    _foresees = False  # pages are let go of as others are opened
    _go_on = PagedPool._append_each

    def fork(self, seq: int, new: int) -> list[PageCopy]:
        """Opens `new` on the very pages of `seq`; no copies are needed until one of them writes."""
        copies = super().fork(seq, new)
        self._gaps[new] = self.gap(seq)
        return copies

    def free(self, seq: int) -> None:
        """Closes `seq` and lets go of its pages; a sequence that is not open is ignored."""
        super().free(seq)
        self._gaps.pop(seq, None)

    def _behind(self, seq: int) -> list[int]:
        """The pages of `seq` that no token behind its last one sees."""
        seen = self._sliding.first_seen(self.length(seq)) - self.gap(seq) // self.page_size
        return self._held[seq][self._sliding.sink_pages : seen]

    def _drop_behind(self, seq: int) -> None:
        behind = self._behind(seq)
        if not behind:
            return
        first, held = self._sliding.sink_pages, self._held[seq]
        del held[first : first + len(behind)]
        tokens = len(behind) * self.page_size
        self._tables.set_length(seq, super().length(seq) - tokens)
        self._gaps[seq] = self.gap(seq) + tokens
        self._tables.rewrite(seq, first, held[first:])
        self.num_dropped += len(behind)
        for page in behind:
            self._pages.drop(page)
