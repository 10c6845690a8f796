"""The prefix cache of a paged pool: a tree of pages that outlive their sequences.

Reference counts stay the truth about pages; the tree holds one reference to each of its own. What
keeps eviction simple: a sequence that holds a page of the tree holds the pages of the tree before
it too, because it took them all, or because they were all its own when the tree took them. So pages
that the tree alone holds can always be reached from the leaves, and count as good as free.

A cached page is never written to. Its sequence has filled it, and whoever shares it does so from
its first token to its last. A page of which only the beginning is equal is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from .pages import Pages
from .prefix_tree import PrefixTree

_WORTH_A_COPY = 4  # of the tokens of a page: one in so many has to be equal


@dataclass(slots=True)
class PrefixCounters:
    """Sums over the life of a pool.

    Attributes:
        lookups: sequences that looked for their prompt.
        lookup_tokens: tokens of those prompts.
        hit_tokens: of these, those that were found and not computed.
        evicted_pages: cached pages that were given up for others.
        evicted_pinned_pages: of these, those whose time (`cache_ttl`) had not passed.
    """

    lookups: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0
    evicted_pinned_pages: int = 0

    def look_up(self, tokens: int, found: int) -> None:
        """Adds a prompt of so many tokens, and how many of them were found."""
        self.lookups += 1
        self.lookup_tokens += tokens
        self.hit_tokens += found

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up that were found, from 0 to 1."""
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Reused:
    """What a sequence starts with.

    Attributes:
        pages: that it holds from now on, the last one perhaps a copy of its own.
        num_tokens: whose K and V they hold, or will when the copies are made.
        copies: (source page, destination page), to be made before the next step, in order.
    """

    pages: list[int]
    num_tokens: int
    copies: list[tuple[int, int]]


class PrefixCache:
    """Hands out and takes in the pages of prefixes.

    Args:
        pages: the pool's.
        page_size: tokens a page.
        counters: to add to.
        clock: seconds, for pins.
    """

    def __init__(
        self,
        pages: Pages,
        page_size: int,
        counters: PrefixCounters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages, self._counters = pages, counters
        self.tree = PrefixTree(page_size, clock)

    def shared_pages(self, namespace: Hashable, tokens: Sequence[int]) -> int:
        """Pages that a sequence of these tokens would share with sequences that hold them."""
        references = self._pages.references
        return sum(references[page] > 1 for page in self.tree.peek(namespace, tokens[:-1]).pages)

    def reuse(self, namespace: Hashable, tokens: Sequence[int]) -> Reused:
        """The longest cached prefix, without the last token: its logits are wanted.

        The last page is a copy if only its beginning is equal, and if that saves enough.
        """
        pages, size = self._pages, self.tree.page_size
        match = self.tree.match(namespace, tokens[:-1])
        held = list(match.pages)
        for page in held:
            pages.hold(page)
        count = len(held) * size
        copies: list[tuple[int, int]] = []
        if match.partial is not None and match.partial[1] * _WORTH_A_COPY >= size:
            source, equal = match.partial
            pages.hold(source)  # so that it is not what makes room for its own copy
            if pages.num_free + pages.num_idle:
                self.make_room(1)
                held.append(pages.take())
                copies.append((source, held[-1]))
                count += equal
            pages.drop(source)
        return Reused(held, count, copies)

    def keep(
        self, namespace: Hashable, tokens: Sequence[int], held: Sequence[int], *, closing: bool
    ) -> None:
        """Takes in the full pages of a sequence.

        Args:
            namespace: of the sequence.
            tokens: whose K and V have been written.
            held: the sequence's pages.
            closing: whether it is about to let go of them.
        """
        size, references = self.tree.page_size, self._pages.references
        stop = len(tokens) // size
        known = self.tree.peek(namespace, tokens[: stop * size]).pages
        if list(held[: len(known)]) != known:
            # Others computed the same before: nobody may go on holding what comes behind theirs.
            full, stop = stop, len(known)
            while closing and stop < full and references[held[stop]] == 1:
                stop += 1
        for page in self.tree.insert(namespace, tokens[: stop * size], held[:stop]):
            self._pages.cache(page)

    def make_room(self, count: int) -> None:
        """Evicts pages until so many are free, or none can be evicted."""
        missing = count - self._pages.num_free
        if missing <= 0:
            return
        free, pinned = self.tree.evict(missing, self._pages.is_idle)
        for page in free + pinned:
            self._pages.uncache(page)
        self._counters.evicted_pages += len(free) + len(pinned)
        self._counters.evicted_pinned_pages += len(pinned)

    def clear(self) -> None:
        """Forgets every prefix; pages that no sequence holds are free again."""
        for page in self.tree.clear():
            self._pages.uncache(page)
