"""The prefix cache of a paged pool: a tree of pages that outlive their sequences.

Reference counts stay the truth about pages; the tree holds one reference to each of its own. What
keeps eviction simple: a sequence that holds a page of the tree holds the pages of the tree before
it too, because it took them all, or because they were all its own when the tree took them. So pages
that the tree alone holds can always be reached from the leaves, and count as good as free. Only a
sequence that sees a sliding window lets go of pages before others that it holds: where nothing else
is left, the tree gives up what stands behind such a page, and the sequence has that by itself.

What makes room goes to pages of the host, if there are any: their ids follow those of the device's
pages. They come back to the device when a prompt wants them, so that whoever was preempted is not
computed anew either. The copies are made in order with the steps, as all others are.

A cached page is never written to. Its sequence has filled it, and whoever shares it does so from
its first token to its last. A page of which only the beginning is equal is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from .pages import Pages
from .prefix_tree import PrefixTree

_SPARE = 256  # one in so many pages is free again when room is made, beside those wanted
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
        moved_out_pages: of the evicted ones, those that went to the host.
        moved_in_pages: pages that came back from there.
    """

    lookups: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0
    evicted_pinned_pages: int = 0
    moved_out_pages: int = 0
    moved_in_pages: int = 0

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
        host: ids of the pages of the host.
    """

    def __init__(
        self,
        pages: Pages,
        page_size: int,
        counters: PrefixCounters,
        clock: Callable[[], float] = time.monotonic,
        host: Iterable[int] = (),
    ) -> None:
        self._pages, self._counters = pages, counters
        self.tree = PrefixTree(page_size, clock, host)

    def shared_pages(self, namespace: Hashable, tokens: Sequence[int]) -> int:
        """Pages that a sequence of these tokens would share with sequences that hold them."""
        references = self._pages.references
        return sum(references[page] > 1 for page in self.tree.peek(namespace, tokens[:-1]).pages)

    def reuse(self, namespace: Hashable, tokens: Sequence[int]) -> Reused:
        """The longest cached prefix, without the last token: its logits are wanted.

        What is on the host comes back as far as there is room. The last page is a copy if only its
        beginning is equal, and if that saves enough.
        """
        pages, tree, tokens = self._pages, self.tree, tokens[:-1]
        match = tree.match(namespace, tokens)
        partial = self._worth_a_copy(match.partial)
        kept = match.pages + ([partial[0]] if partial and pages.has(partial[0]) else [])
        for page in kept:
            pages.hold(page)  # so that nothing of it makes room for the rest
        wanted = len(match.host) + (partial is not None)
        copies = self.make_room(min(wanted, pages.num_free + pages.num_idle))
        if match.host or (partial and not pages.has(partial[0])):
            match = tree.peek(namespace, tokens)  # the host may have given up some of it
            partial = self._worth_a_copy(match.partial)
        back = match.host[: pages.num_free]
        held = match.pages + [pages.take() for _ in back]
        copies += zip(back, held[len(match.pages) :], strict=True)
        pages.cache_each(tree.insert(namespace, tokens[: len(held) * tree.page_size], held))
        self._counters.moved_in_pages += len(back)
        count = len(held) * tree.page_size
        if partial is not None and len(back) == len(match.host) and pages.num_free:
            source, equal = partial
            held.append(pages.take())
            copies.append((source, held[-1]))
            count += equal
        for page in kept[len(match.pages) :]:
            pages.drop(page)
        return Reused(held, count, copies)

    def _worth_a_copy(self, partial: tuple[int, int] | None) -> tuple[int, int] | None:
        if partial is None or partial[1] * _WORTH_A_COPY < self.tree.page_size:
            return None
        return partial

    def keep(
        self,
        namespace: Hashable,
        tokens: Sequence[int],
        held: Sequence[int],
        gap: range = range(0),
        *,
        closing: bool,
    ) -> None:
        """Takes in the full pages of a sequence.

        Args:
            namespace: of the sequence.
            tokens: whose K and V have been written.
            held: the sequence's pages.
            gap: of its pages the numbers of those that it has let go of: the tree's are in their
                place, if it still has them all. Else nothing is taken in.
            closing: whether it is about to let go of them.
        """
        size, references = self.tree.page_size, self._pages.references
        stop = len(tokens) // size
        known = self.tree.peek(namespace, tokens[: stop * size]).pages
        if gap:
            if len(known) < gap.stop:
                return
            held = [*held[: gap.start], *known[gap.start : gap.stop], *held[gap.start :]]
        if list(held[: len(known)]) != known:
            # Others computed the same before: nobody may go on holding what comes behind theirs.
            full, stop = stop, len(known)
            while closing and stop < full and references[held[stop]] == 1:
                stop += 1
        self._pages.cache_each(self.tree.insert(namespace, tokens[: stop * size], held[:stop]))

    def make_room(self, count: int) -> list[tuple[int, int]]:
        """Evicts pages until so many are free, or none can be evicted. Where nothing goes to the
        host some more go with them, so that this is not done for each few pages that are taken.

        Returns:
            the copies to the host to be made first, in order.
        """
        missing = count - self._pages.num_free
        if missing <= 0:
            return []
        spare = self._pages.count // _SPARE
        gone = self.tree.evict(missing, self._pages.is_idle, missing + spare)
        self._pages.uncache_idle(gone.pages)
        for page in gone.pinned + gone.left:
            self._pages.uncache(page)
        self._counters.evicted_pages += len(gone.pages) + len(gone.pinned)
        self._counters.evicted_pinned_pages += len(gone.pinned)
        self._counters.moved_out_pages += len(gone.copies)
        return gone.copies

    def clear(self) -> None:
        """Forgets every prefix; pages that no sequence holds are free again."""
        for page in self.tree.clear():
            self._pages.uncache(page)
