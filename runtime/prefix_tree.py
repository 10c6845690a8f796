"""A radix tree over pages of tokens: which cached page holds K and V of which prefix.

An edge is one or more full pages, and edges are split where pages meet, so that two prefixes share
every page in which they are equal (RadixAttention, Zheng et al. 2024). Least recently used leaves
go first. The tree knows page ids only: whoever owns the pages counts their references.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile

_Key = tuple[int, ...]  # the tokens of one page


@dataclass(frozen=True, slots=True)
class Match:
    """What of some tokens is cached.

    Attributes:
        pages: that are equal from first to last token, in order.
        partial: the page behind them whose first tokens are equal, and how many; None for none.
    """

    pages: list[int]
    partial: tuple[int, int] | None


class _Node:
    """An edge, and what branches off at its end. `keys` are those of `children`, sorted."""

    __slots__ = ("children", "keys", "pages", "parent", "pinned_until", "tokens")

    def __init__(self, parent: _Node | None, tokens: list[int], pages: list[int]) -> None:
        self.parent, self.tokens, self.pages = parent, tokens, pages
        self.children: dict[_Key, _Node] = {}
        self.keys: list[_Key] = []
        self.pinned_until = -math.inf

    def add(self, key: _Key, child: _Node) -> None:
        if key not in self.children:
            insort(self.keys, key)
        self.children[key] = child
        child.parent = self

    def remove(self, key: _Key) -> None:
        del self.children[key]
        del self.keys[bisect_left(self.keys, key)]


@dataclass(frozen=True, slots=True)
class _Walk:
    """How far tokens lead: all of `node`'s ancestors, and `count` pages of `node` itself."""

    node: _Node
    count: int
    pages: list[int]


class PrefixTree:
    """Cached pages by the tokens that they and all pages before them hold.

    Sequences of different namespaces (an adapter, a tenant, a cache's element type) share nothing.

    Args:
        page_size: tokens a page.
        clock: seconds, for pins; it never goes back.

    Attributes:
        num_pages: that the tree holds.
    """

    def __init__(self, page_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.page_size, self.num_pages = page_size, 0
        self._clock = clock
        self._roots: dict[Hashable, _Node] = {}
        # Least recently used first. A node is touched after its children, so that what is evicted
        # from the front never leaves a child without its parent.
        self._order: OrderedDict[_Node, None] = OrderedDict()

    def peek(self, namespace: Hashable, tokens: Sequence[int]) -> Match:
        """What of `tokens` is cached; changes nothing."""
        walk = self._walk(namespace, tokens)
        return Match(walk.pages, self._partial(walk, tokens))

    def match(self, namespace: Hashable, tokens: Sequence[int]) -> Match:
        """What of `tokens` is cached; its whole pages are the most recently used from now on."""
        walk = self._walk(namespace, tokens)
        match = Match(walk.pages, self._partial(walk, tokens))
        self._touch(self._cut(walk))
        return match

    def insert(self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Caches a prefix, which is the most recently used from now on.

        Args:
            namespace: of the sequence.
            tokens: `page_size` for each of `pages`.
            pages: that hold their K and V.

        Returns:
            the pages that the tree holds since: those behind what it has had already.
        """
        if not pages:
            return []
        self._roots.setdefault(namespace, _Node(None, [], []))
        walk = self._walk(namespace, tokens)
        node, known = self._cut(walk), len(walk.pages)
        new = list(pages[known:])
        if new:
            start = known * self.page_size
            leaf = _Node(node, list(tokens[start : len(pages) * self.page_size]), new)
            node.add(self._key(leaf.tokens), leaf)
            self._order[leaf] = None
            self.num_pages += len(new)
            node = leaf
        self._touch(node)
        return new

    def pin(self, namespace: Hashable, tokens: Sequence[int], seconds: float) -> None:
        """Keeps the cached whole pages of `tokens` for so long, as far as that can be."""
        until = self._clock() + seconds
        node = self._cut(self._walk(namespace, tokens))
        self._touch(node)
        while node.parent is not None:
            node.pinned_until = max(node.pinned_until, until)
            node = node.parent

    def evict(self, count: int, idle: Callable[[int], bool]) -> tuple[list[int], list[int]]:
        """Gives up pages, the least recently used leaves' first; pinned ones if no others are left.

        Args:
            count: the most pages to give up.
            idle: whether nobody but the tree holds a page. Whoever holds one has to hold those
                before it.

        Returns:
            the pages that were not pinned, and those that were.
        """
        free = self._evict(count, idle, self._clock())
        return free, self._evict(count - len(free), idle, math.inf)

    def clear(self) -> list[int]:
        """Forgets all prefixes; returns the pages."""
        pages = [page for node in self._order for page in node.pages]
        self._roots.clear()
        self._order.clear()
        self.num_pages = 0
        return pages

    def _walk(self, namespace: Hashable, tokens: Sequence[int]) -> _Walk:
        node = self._roots.get(namespace) or _Node(None, [], [])
        pages: list[int] = []
        count, size = 0, self.page_size
        while count == len(node.pages):
            start = len(pages) * size
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            node, count = child, self._equal_pages(child.tokens, tokens, start)
            pages += child.pages[:count]
        return _Walk(node, count, pages)

    def _equal_pages(self, edge: list[int], tokens: Sequence[int], start: int) -> int:
        size = self.page_size
        if list(tokens[start : start + len(edge)]) == edge:
            return len(edge) // size
        count = 0
        while list(tokens[start : start + size]) == edge[count * size : (count + 1) * size]:
            start, count = start + size, count + 1
        return count

    def _partial(self, walk: _Walk, tokens: Sequence[int]) -> tuple[int, int] | None:
        size, node = self.page_size, walk.node
        start = len(walk.pages) * size
        rest = tuple(tokens[start : start + size])
        candidates: list[tuple[int, Sequence[int]]] = []
        if walk.count < len(node.pages):
            at = walk.count * size
            candidates.append((node.pages[walk.count], node.tokens[at : at + size]))
        else:  # the longest common beginning is that of a neighbour in the order of keys
            place = bisect_left(node.keys, rest)
            near = node.keys[max(place - 1, 0) : place + 1]
            candidates += [(node.children[key].pages[0], key) for key in near]
        found = [(page, _common(rest, key)) for page, key in candidates]
        best = max(found, key=lambda one: one[1], default=(0, 0))
        return best if best[1] else None

    def _key(self, tokens: list[int]) -> _Key:
        return tuple(tokens[: self.page_size])

    def _cut(self, walk: _Walk) -> _Node:
        """The node that ends where the walk does, split off if need be. To be touched at once."""
        node = walk.node
        if walk.count == len(node.pages):
            return node
        parent = node.parent
        assert parent is not None and walk.count
        cut = walk.count * self.page_size
        upper = _Node(parent, node.tokens[:cut], node.pages[: walk.count])
        upper.pinned_until = node.pinned_until
        parent.add(self._key(upper.tokens), upper)
        del node.tokens[:cut], node.pages[: walk.count]
        upper.add(self._key(node.tokens), node)
        self._order[upper] = None
        return upper

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def _evict(self, count: int, idle: Callable[[int], bool], now: float) -> list[int]:
        taken: list[int] = []
        gone: list[_Node] = []
        for node in self._order:
            if len(taken) >= count:
                break
            if node.children or node.pinned_until > now:
                continue
            key = self._key(node.tokens)
            while node.pages and len(taken) < count and idle(node.pages[-1]):
                taken.append(node.pages.pop())
            del node.tokens[len(node.pages) * self.page_size :]
            if not node.pages:
                assert node.parent is not None
                node.parent.remove(key)
                gone.append(node)
        for node in gone:
            del self._order[node]
        self.num_pages -= len(taken)
        if any(node.parent is not None and _is_bare_root(node.parent) for node in gone):
            self._roots = {name: root for name, root in self._roots.items() if root.children}
        return taken


def _is_bare_root(node: _Node) -> bool:
    return node.parent is None and not node.children


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
