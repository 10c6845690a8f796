"""Where each sequence's K and V live: pages or slots, block tables, reference counts.

A pool only keeps the books. The memory itself belongs to the executor, which is told what to copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CapacityError, UsageError
from .block_tables import BlockTables, TablePatch
from .going_on import NO_PAGES, GoingOn
from .pages import Pages
from .prefix_cache import PrefixCache, PrefixCounters
from .sliding import ENDLESS

PageCopy = tuple[int, int]  # (source page, destination page); ids from num_pages on: the host's
Extension = tuple[NDArray[np.int64], list[PageCopy], TablePatch | None]  # of `extend`
Slots = list[int] | NDArray[np.int64]  # page * page_size + offset of each token; one is a list


class KVPool(Protocol):
    """The books of a KV memory of `num_pages` pages of `page_size` tokens each.

    Sequences are named by any unique integers. A copy that a method returns must be made before
    the next step runs, in the order given.
    """

    num_pages: int
    page_size: int
    host_pages: int  # of the host, with the ids from num_pages on
    shares: bool  # whether fork lets two sequences hold the same page
    caches: bool  # whether prefixes outlive their sequences
    slides: bool  # whether sequences let go of pages that nobody will see again
    max_append: int  # the most tokens that append takes at once
    prefix_counters: PrefixCounters

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        ...

    @property
    def num_available(self) -> int:
        """Pages that `append`, `fork` and `reuse` may take: those that no sequence holds."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits into the empty pool, in tokens."""
        ...

    def most_pages(self, num_tokens: int) -> int:
        """Pages that a sequence of so many tokens holds at most, at any time."""
        ...

    def add(self, seq: int) -> None:
        """Opens an empty sequence."""
        ...

    def pages_to_open(self, tokens: Sequence[int], namespace: Hashable) -> int:
        """Available pages that `reuse` of these tokens and an `append` of the rest would take."""
        ...

    def reuse(
        self, seq: int, tokens: Sequence[int], namespace: Hashable
    ) -> tuple[int, list[PageCopy]]:
        """Opens `seq` on the longest cached prefix of `tokens`, never all of them.

        Returns:
            the tokens whose K and V are there, and the copies to make first.
        """
        ...

    def keep(
        self, seq: int, tokens: Sequence[int], namespace: Hashable, *, closing: bool = False
    ) -> None:
        """Caches the full pages of `tokens`, the first of `seq`, whose K and V have been written.

        `closing` says that `free(seq)` comes next.
        """
        ...

    def pin(self, tokens: Sequence[int], namespace: Hashable, seconds: float) -> None:
        """For so long pages of `tokens` that are cached make room only if nothing else can."""
        ...

    def clear_cache(self) -> None:
        """Forgets every cached prefix."""
        ...

    def length(self, seq: int) -> int:
        """Tokens of `seq` that have a place."""
        ...

    def gap(self, seq: int) -> int:
        """Tokens of `seq` that its block table leaves out, as nobody will see them again: whole
        pages between its first ones and its last. Places and lengths in the table are less by it.
        """
        ...

    def drops(self, seq: int, num_tokens: int) -> bool:
        """Whether `append(seq, num_tokens)` would let go of pages of `seq`."""
        ...

    def pages_needed(self, seq: int, num_tokens: int) -> int:
        """Available pages that `append` of so many tokens, in as many parts as it takes, needs."""
        ...

    def append(self, seq: int, num_tokens: int) -> tuple[Slots, list[PageCopy]]:
        """Finds places for the next tokens of `seq`.

        Returns:
            the slot (page * page_size + offset) of each token, and the copies to make first.

        Raises:
            CapacityError: there are not enough pages; nothing has changed.
        """
        ...

    def extend(self, seqs: Sequence[int]) -> Extension | None:
        """A place for one more token of each: their slots, i64[B], the copies to make first, and
        what their block tables have got, if that is known; None, and nothing has changed, if there
        are not enough pages.
        """
        ...

    def fork_pages_needed(self, seq: int) -> int:
        """Available pages that `fork(seq, …)` would take."""
        ...

    def fork(self, seq: int, new: int) -> list[PageCopy]:
        """Opens `new` with the contents of `seq`; returns the copies to make."""
        ...

    def free(self, seq: int) -> None:
        """Closes `seq` and lets go of its pages; a sequence that is not open is ignored."""
        ...

    def block_tables(self, seqs: Sequence[int]) -> Tensor:
        """Page ids i32[B, M] of `seqs`, M the most pages that one of them holds, padded with 0."""
        ...

    def waste(self) -> float:
        """Share of the places in held pages that hold no token, from 0 to 1."""
        ...


class PagedPool:
    """Pages on demand; forks share pages and copy one when they write into it (PagedAttention,
    Kwon et al. 2023, sections 4.2 to 4.4).

    Page 0 is reserved: block tables are padded with it, and padding tokens may write into it. So a
    pool of `num_pages` holds (num_pages - 1) * page_size tokens.

    Args:
        num_pages: the reserved one included.
        page_size: tokens a page.
        prefix_caching: whether pages of prefixes outlive their sequences (`prefix_cache.py`).
        host_pages: pages of the host, for cached prefixes that make room on the device.
        clock: seconds, for pinned prefixes; it never goes back.

    Raises:
        UsageError: fewer than 2 pages, or a page size below 1.
    """

    shares = True
    slides = False
    max_append = ENDLESS
    _first_page = 1
    _foresees = True  # whether a sequence goes on in the page that it is in, and then in a new one

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix_caching: bool = False,
        host_pages: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_pages <= self._first_page or page_size < 1:
            raise UsageError(
                type(self).__name__,
                expected=f"more than {self._first_page} pages of 1 token or more",
                found=f"{num_pages} pages of {page_size} tokens",
                remedy="Give the pool more memory (memory_fraction, KVCacheConfig.page_size).",
            )
        self.num_pages, self.page_size = num_pages, page_size
        self.host_pages = host_pages if prefix_caching else 0
        self.caches, self.prefix_counters = prefix_caching, PrefixCounters()
        self._pages = Pages(self._first_page, num_pages)
        self._cache: PrefixCache | None = None
        if prefix_caching:
            host = range(num_pages, num_pages + host_pages)
            self._cache = PrefixCache(self._pages, page_size, self.prefix_counters, clock, host)
        self._all_tables = BlockTables()
        self._all_held: dict[int, list[int]] = {}
        self._going: GoingOn | None = None  # may be ahead of these two
        self._extended: Sequence[int] | None = None  # whom `extend` was last called for

    @property
    def _tables(self) -> BlockTables:
        if self._going is not None:
            self._going.settle(self._all_held)
        return self._all_tables

    @property
    def _held(self) -> dict[int, list[int]]:
        """The pages of each sequence, in order."""
        if self._going is not None:
            self._going.settle(self._all_held)
        return self._all_held

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._pages.num_free

    @property
    def num_available(self) -> int:
        """Pages that no sequence holds: free ones, and those that the prefix cache alone holds."""
        return self._pages.num_free + self._pages.num_idle

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits into the empty pool, in tokens."""
        return (self.num_pages - self._first_page) * self.page_size

    def most_pages(self, num_tokens: int) -> int:
        """Pages that a sequence of so many tokens holds at most, at any time."""
        return -(-num_tokens // self.page_size)

    def add(self, seq: int) -> None:
        """Opens an empty sequence."""
        self._tables.open(seq)
        self._held[seq] = []

    def pages_to_open(self, tokens: Sequence[int], namespace: Hashable) -> int:
        """Available pages that `reuse` of these tokens and an `append` of the rest would take.

        Cached pages that no sequence holds are available, and taken like others.
        """
        pages = -(-len(tokens) // self.page_size)
        return pages if self._cache is None else pages - self._cache.shared_pages(namespace, tokens)

    def reuse(
        self, seq: int, tokens: Sequence[int], namespace: Hashable
    ) -> tuple[int, list[PageCopy]]:
        """Opens `seq` on the longest cached prefix of `tokens`, never all of them: how many there
        are, and the copies to make first.
        """
        self.add(seq)
        if self._cache is None:
            return 0, []
        found = self._cache.reuse(namespace, tokens)
        self._held[seq] = found.pages
        self._tables.set_length(seq, found.num_tokens)
        self._tables.write(seq, 0, found.pages)
        return found.num_tokens, found.copies

    def keep(
        self, seq: int, tokens: Sequence[int], namespace: Hashable, *, closing: bool = False
    ) -> None:
        """Caches the full pages of `tokens`, the first of `seq`, whose K and V have been written;
        `closing` says that `free(seq)` comes next.
        """
        if self._cache is not None:
            self._cache.keep(namespace, tokens, self._held[seq], closing=closing)

    def pin(self, tokens: Sequence[int], namespace: Hashable, seconds: float) -> None:
        """For so long pages of `tokens` that are cached make room only if nothing else can."""
        if self._cache is not None:
            self._cache.tree.pin(namespace, tokens, seconds)

    def clear_cache(self) -> None:
        """Forgets every cached prefix; pages that no sequence holds are free again."""
        if self._cache is not None:
            self._cache.clear()

    def length(self, seq: int) -> int:
        """Tokens of `seq` that have a place."""
        return self._tables.length(seq)

    def gap(self, seq: int) -> int:
        """Tokens of `seq` that its block table leaves out: none."""
        return 0

    def drops(self, seq: int, num_tokens: int) -> bool:
        """Whether `append(seq, num_tokens)` would let go of pages of `seq`: never."""
        return False

    def _writes_shared(self, seq: int) -> bool:
        """Whether the next token of `seq` goes into a page that another sequence holds too."""
        if self._tables.length(seq) % self.page_size == 0:
            return False
        return self._pages.references[self._held[seq][-1]] > 1

    def pages_needed(self, seq: int, num_tokens: int) -> int:
        """Available pages that `append(seq, num_tokens)` would take."""
        if num_tokens == 0:
            return 0
        held = self._held[seq]
        total = -(-(self._tables.length(seq) + num_tokens) // self.page_size)
        return total - len(held) + self._writes_shared(seq)

    def append(self, seq: int, num_tokens: int) -> tuple[Slots, list[PageCopy]]:
        """Finds places for the next tokens: their slots, and the copies to make first.

        Raises:
            CapacityError: there are not enough pages; nothing has changed.
        """
        needed = self.pages_needed(seq, num_tokens)
        held, length = self._held[seq], self._tables.length(seq)
        copies: list[PageCopy] = []
        if needed:
            copies += self._make_room(needed)
            if self._writes_shared(seq):
                copies.append(self._unshare_last(seq))
                needed -= 1
            if needed:
                new = self._pages.take_array(needed)
                self._tables.write(seq, len(held), new)
                held += new.tolist()
        self._tables.set_length(seq, length + num_tokens)
        return self._slots(held, length, length + num_tokens), copies

    def extend(self, seqs: Sequence[int]) -> Extension | None:
        """A place for one more token of each: their slots, i64[B], the copies to make first, and
        what their block tables have got, if that is known; None, and nothing has changed, if there
        are not enough pages.

        `append` for each, in a fraction of the time: most need no page. A tuple that was given the
        last time takes less.
        """
        going = self._going
        if going is not None and going.seqs is seqs and going.holds(seqs):
            return self._extend_same(going)
        found = self._extend_others(seqs)
        self._going = None
        if found is not None and self._foresees and isinstance(seqs, tuple):
            if self._extended is seqs:  # for the second time, so that there may be more
                self._going = GoingOn(self._tables, seqs, found[0], self.page_size)
            self._extended = seqs
        return found

    def _extend_same(self, going: GoingOn) -> Extension | None:
        count, copies = going.num_opening, list[PageCopy]()
        if not count:
            return going.go_on(), [], NO_PAGES
        if count > self._pages.num_free:
            if count > self.num_available:
                return None
            copies = self._make_room(count)
        slots, patch = going.open(self._pages.take_array(count))
        if going.is_far:
            going.settle(self._all_held)
        return slots, copies, patch

    def _extend_others(self, seqs: Sequence[int]) -> Extension | None:
        tables, size = self._tables, self.page_size
        rows = tables.places(seqs)
        lengths = tables.lengths[rows]
        offsets = lengths % size
        pages = tables.data[rows, (lengths - 1) // size]  # where the last token is, if there is one
        slots = np.multiply(pages, size, dtype=np.int64) + offsets
        opens, shared = offsets == 0, self._pages.shared[pages] > 1
        needs = opens | shared
        if not np.count_nonzero(needs):
            tables.lengths[rows] += 1
            return slots, [], None
        shares = shared & ~opens
        opening = [seqs[row] for row in opens.nonzero()[0].tolist()]
        sharing: list[int] = shares.nonzero()[0].tolist()
        needed = self._pages_to_go_on(opening) + len(sharing)
        if needed > self.num_available:
            return None
        tables.lengths[rows] += ~needs
        copies: list[PageCopy] = []
        if opening:
            copies += self._go_on(opening)
            held = self._held
            slots[opens] = [held[seq][-1] * size for seq in opening]
        for row in sharing:
            (slots[row],), made = self.append(seqs[row], 1)
            copies += made
        return slots, copies, None

    def _pages_to_go_on(self, seqs: list[int]) -> int:
        """Available pages that `_go_on` would take."""
        return len(seqs)

    def _go_on(self, seqs: list[int]) -> list[PageCopy]:
        """`append` of one token to each of these, whose pages are full: the copies to make."""
        tables = self._tables
        copies = self._make_room(len(seqs))
        pages, held = self._pages.take_each(len(seqs)), self._held
        for seq, page in zip(seqs, pages, strict=True):
            held[seq].append(page)
        rows = tables.places(seqs)
        lengths = tables.lengths[rows]
        columns = lengths // self.page_size
        tables.write_each(rows, columns, pages, int(columns.max()) + 1)
        tables.lengths[rows] = lengths + 1
        return copies

    def _append_each(self, seqs: list[int]) -> list[PageCopy]:
        return [copy for seq in seqs for copy in self.append(seq, 1)[1]]

    def _unshare_last(self, seq: int) -> PageCopy:
        held = self._held[seq]
        shared, own = held[-1], self._pages.take()
        held[-1] = own
        self._tables.write(seq, len(held) - 1, [own])
        self._pages.drop(shared)
        return shared, own

    def _slots(self, held: list[int], start: int, stop: int) -> Slots:
        size = self.page_size
        if stop - start == 1:
            return [held[start // size] * size + start % size]
        first = start // size
        pages = np.array(held[first : -(-stop // size)], dtype=np.int64)
        slots = (pages[:, None] * size + np.arange(size)).reshape(-1)
        return slots[start - first * size : stop - first * size]

    def fork_pages_needed(self, seq: int) -> int:
        """Available pages that `fork(seq, …)` would take: none, they are shared."""
        return 0

    def fork(self, seq: int, new: int) -> list[PageCopy]:
        """Opens `new` on the very pages of `seq`; no copies are needed until one of them writes."""
        self.add(new)
        self._held[new] = list(self._held[seq])
        self._tables.set_length(new, self._tables.length(seq))
        self._tables.write(new, 0, self._held[new])
        for page in self._held[new]:
            self._pages.hold(page)
        return []

    def free(self, seq: int) -> None:
        """Closes `seq` and lets go of its pages; a sequence that is not open is ignored."""
        if seq in self._held:
            self._pages.drop_each(self._held.pop(seq))
            self._tables.close(seq)

    def block_tables(self, seqs: Sequence[int]) -> Tensor:
        """Page ids i32[B, M] of `seqs`, M the most pages that one of them holds, padded with 0."""
        rows = self._tables.places(seqs)
        longest = int(self._tables.lengths[rows].max())
        return self._tables.gather(rows, -(-longest // self.page_size))

    def waste(self) -> float:
        """Share of the places in held pages that hold no token, from 0 to 1."""
        used: dict[int, int] = {}  # a shared page counts once, with its fullest holder
        for seq, held in self._held.items():
            for index, page in enumerate(held):
                tokens = min(self.page_size, self._tables.length(seq) - index * self.page_size)
                used[page] = max(used.get(page, 0), tokens)
        return 1 - sum(used.values()) / (len(used) * self.page_size) if used else 0.0

    def _make_room(self, needed: int) -> list[PageCopy]:
        if needed > self.num_available:
            raise CapacityError(
                "the KV pool",
                expected=f"{needed} free pages of {self.page_size} tokens",
                found=f"{self.num_available} free of {self.num_pages}",
                remedy="Give the pool more memory (memory_fraction), or run fewer requests.",
            )
        if needed > self.num_free and self._cache is not None:
            return self._cache.make_room(needed)
        return []
