"""A radix tree over pages of tokens: which cached page holds K and V of which prefix.

An edge is one or more full pages, and edges are split where pages meet, so that two prefixes share
every page in which they are equal (RadixAttention, Zheng et al. 2024). Least recently used leaves
go first: from the device to the host, where there is room for that, and from the host for good. So
on every path from a root the pages on the device come first. The tree knows page ids only: whoever
owns the device's pages counts their references.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

_Key = tuple[int, ...]  # the tokens of one page


@dataclass(frozen=True, slots=True)
class Match:
    """What of some tokens is cached.

    Attributes:
        pages: on the device that are equal from first to last token, in order.
        host: those behind them, on the host.
        partial: the page behind all of these whose first tokens are equal, and how many; None for
            none.
    """

    pages: list[int]
    host: list[int]
    partial: tuple[int, int] | None


@dataclass(slots=True)
class Evicted:
    """Pages of the device that were given up.

    Attributes:
        pages: those that were not pinned.
        pinned: those that were.
        left: pages that sequences hold on to; the tree has given them up with those before them.
        copies: (page, page of the host) of those that were moved, to be made in order before the
            pages are written to.
    """

    pages: list[int] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class _Node:
    """An edge, and what branches off at its end.

    Attributes:
        keys: those of `children`, sorted.
        on_device: how many of `pages` are on the device; the others, behind them, on the host.
        device_children: how many of `children` have pages on the device.
    """

    __slots__ = (
        "children",
        "device_children",
        "keys",
        "on_device",
        "pages",
        "parent",
        "pinned_until",
        "tokens",
    )

    def __init__(
        self, parent: _Node | None, tokens: list[int], pages: list[int], on_device: int
    ) -> None:
        self.parent, self.tokens, self.pages = parent, tokens, pages
        self.on_device, self.device_children = on_device, 0
        self.children: dict[_Key, _Node] = {}
        self.keys: list[_Key] = []
        self.pinned_until = -math.inf

    @property
    def on_host(self) -> int:
        return len(self.pages) - self.on_device

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
    on_device: int


class PrefixTree:
    """Cached pages by the tokens that they and all pages before them hold.

    Sequences of different namespaces (an adapter, a tenant, a cache's element type) share nothing.

    Args:
        page_size: tokens a page.
        clock: seconds, for pins; it never goes back.
        host: ids of the pages that the host has for what the device gives up.

    Attributes:
        num_pages: of the device that the tree holds.
    """

    def __init__(
        self,
        page_size: int,
        clock: Callable[[], float] = time.monotonic,
        host: Iterable[int] = (),
    ) -> None:
        self.page_size, self.num_pages = page_size, 0
        self._clock = clock
        self._spare = list(host)
        self._roots: dict[Hashable, _Node] = {}
        self._has_bare_roots = False
        # Nodes with pages on the device, and with pages on the host, least recently used first. A
        # node is touched after its children, so that what is evicted from the front never leaves a
        # child without its parent.
        self._device: OrderedDict[_Node, None] = OrderedDict()
        self._host: OrderedDict[_Node, None] = OrderedDict()

    @property
    def num_host(self) -> int:
        """Pages of the host that hold something."""
        return sum(node.on_host for node in self._host)

    def peek(self, namespace: Hashable, tokens: Sequence[int]) -> Match:
        """What of `tokens` is cached; changes nothing."""
        walk = self._walk(namespace, tokens)
        cut = walk.on_device
        return Match(walk.pages[:cut], walk.pages[cut:], self._partial(walk, tokens))

    def match(self, namespace: Hashable, tokens: Sequence[int]) -> Match:
        """What of `tokens` is cached; its whole pages are the most recently used from now on."""
        match = self.peek(namespace, tokens)
        self._touch(self._cut(self._walk(namespace, tokens)))
        return match

    def insert(self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Caches a prefix, which is the most recently used from now on.

        Args:
            namespace: of the sequence.
            tokens: `page_size` for each of `pages`.
            pages: of the device that hold their K and V.

        Returns:
            the pages that the tree holds since: those behind what it has had on the device.
        """
        if not pages:
            return []
        self._roots.setdefault(namespace, _Node(None, [], [], 0))
        walk = self._walk(namespace, tokens[: len(pages) * self.page_size])
        node, known = self._cut(walk), len(walk.pages)
        self._bring_back(node, pages, walk.on_device, known)
        if known < len(pages):
            start = known * self.page_size
            rest = list(pages[known:])
            leaf = _Node(node, list(tokens[start : len(pages) * self.page_size]), rest, len(rest))
            node.add(self._key(leaf.tokens), leaf)
            node.device_children += 1
            self._file(leaf)
            node = leaf
        self._touch(node)
        new = list(pages[walk.on_device :])
        self.num_pages += len(new)
        return new

    def pin(self, namespace: Hashable, tokens: Sequence[int], seconds: float) -> None:
        """Keeps the cached whole pages of `tokens` for so long, as far as that can be."""
        until = self._clock() + seconds
        node = self._cut(self._walk(namespace, tokens))
        self._touch(node)
        while node.parent is not None:
            node.pinned_until = max(node.pinned_until, until)
            node = node.parent

    def evict(self, count: int, idle: Callable[[int], bool], most: int = 0) -> Evicted:
        """Gives up pages of the device, the least recently used ends first; pinned ones if no
        others are left. They are moved to the host, if there are any pages there.

        Args:
            count: the most pages to give up.
            most: the most if these are neither pinned nor moved to the host, if it is larger.
            idle: whether nobody but the tree holds a page. What is held behind one is given up with
                it, if nothing else is left.
        """
        found = Evicted()
        moves = self._spare or self._host
        most = count if moves else max(count, most)
        found.pages = self._evict(most, idle, self._clock(), found.copies)
        found.pinned = self._evict(count - len(found.pages), idle, math.inf, found.copies)
        missing = count - len(found.pages) - len(found.pinned)
        while missing > 0 and (left := self._bare_end(idle)):
            found.left += left
            taken = self._evict(missing, idle, math.inf, found.copies)
            found.pages += taken
            missing -= len(taken)
        self._drop_bare_roots()
        return found

    def clear(self) -> list[int]:
        """Forgets all prefixes; returns the device's pages."""
        pages = [page for node in self._device for page in node.pages[: node.on_device]]
        self._spare += [page for node in self._host for page in node.pages[node.on_device :]]
        self._roots.clear()
        self._device.clear()
        self._host.clear()
        self.num_pages = 0
        return pages

    def _walk(self, namespace: Hashable, tokens: Sequence[int]) -> _Walk:
        node = self._roots.get(namespace) or _Node(None, [], [], 0)
        pages: list[int] = []
        count, on_device, size = 0, 0, self.page_size
        while count == len(node.pages):
            start = len(pages) * size
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            node, count = child, self._equal_pages(child.tokens, tokens, start)
            pages += child.pages[:count]
            on_device += min(count, child.on_device)
        return _Walk(node, count, pages, on_device)

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

    def _file(self, node: _Node) -> None:
        """Puts a node into the orders that it belongs to now, behind all others if it is new."""
        belongs = ((self._device, node.on_device), (self._host, node.on_host))
        for order, pages in belongs:
            if pages:
                order.setdefault(node)
            else:
                order.pop(node, None)

    def _cut(self, walk: _Walk) -> _Node:
        """The node that ends where the walk does, split off if need be. To be touched at once."""
        node = walk.node
        if walk.count == len(node.pages):
            return node
        parent = node.parent
        assert parent is not None and walk.count
        cut = walk.count * self.page_size
        on_device = min(node.on_device, walk.count)
        upper = _Node(parent, node.tokens[:cut], node.pages[: walk.count], on_device)
        upper.pinned_until = node.pinned_until
        parent.add(self._key(upper.tokens), upper)
        del node.tokens[:cut], node.pages[: walk.count]
        node.on_device -= on_device
        upper.add(self._key(node.tokens), node)
        upper.device_children = int(node.on_device > 0)
        self._file(upper)
        self._file(node)
        return upper

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            for order in (self._device, self._host):
                if node in order:
                    order.move_to_end(node)
            node = node.parent

    def _bring_back(self, node: _Node, pages: Sequence[int], first: int, stop: int) -> None:
        """Puts pages of the device in the place of the host's: [first, stop) of a path that ends
        with `node`.
        """
        while stop > first:
            assert node.parent is not None
            start = max(stop - len(node.pages), first)
            place = len(node.pages) - (stop - start)
            self._spare += node.pages[place:]
            node.pages[place:] = pages[start:stop]
            node.parent.device_children += not node.on_device
            node.on_device = len(node.pages)
            self._file(node)
            node, stop = node.parent, start

    def _evict(
        self,
        count: int,
        idle: Callable[[int], bool],
        now: float,
        copies: list[tuple[int, int]],
    ) -> list[int]:
        taken: list[int] = []
        touched: list[_Node] = []
        for node in self._device:
            if len(taken) >= count:
                break
            if node.device_children or node.pinned_until > now:
                continue
            touched.append(node)
            if not (self._spare or self._host):
                taken += self._give_up_some(node, count - len(taken), idle)
                continue
            while node.on_device and len(taken) < count and idle(node.pages[node.on_device - 1]):
                taken.append(self._give_up(node, copies))
        for node in touched:
            self._file(node)
        self.num_pages -= len(taken)
        return taken

    def _bare_end(self, idle: Callable[[int], bool]) -> list[int]:
        """Makes an end of the last idle page of a node, the least recently used one that has any:
        the pages of the device behind it, which are out of the tree.
        """
        for node in self._device:
            stop = node.on_device
            while stop and not idle(node.pages[stop - 1]):
                stop -= 1
            if stop:
                return self._cut_off(node, stop)
        return []

    def _cut_off(self, node: _Node, stop: int) -> list[int]:
        """Leaves a node its first pages, at least one of the device, and nothing behind them."""
        gone = node.pages[stop : node.on_device]
        self._spare += node.pages[node.on_device :]
        stack = list(node.children.values())
        while stack:
            child = stack.pop()
            stack += child.children.values()
            gone += child.pages[: child.on_device]
            self._spare += child.pages[child.on_device :]
            for order in (self._device, self._host):
                order.pop(child, None)
        node.children.clear()
        node.keys.clear()
        node.on_device, node.device_children = stop, 0
        self._cut_pages(node, stop)
        self._file(node)
        self.num_pages -= len(gone)
        return gone

    def _give_up_some(self, node: _Node, most: int, idle: Callable[[int], bool]) -> list[int]:
        """`_give_up` of so many idle pages, where nothing is or can be on the host."""
        stop = last = node.on_device
        while stop and last - stop < most and idle(node.pages[stop - 1]):
            stop -= 1
        gone = node.pages[stop:last]
        if gone:
            assert node.parent is not None
            node.on_device = stop
            node.parent.device_children -= not stop
            self._cut_pages(node, stop)
        return gone[::-1]

    def _give_up(self, node: _Node, copies: list[tuple[int, int]]) -> int:
        """Takes the last page on the device away from a node."""
        last = node.on_device - 1
        page, host = node.pages[last], self._room_on_host()
        node.on_device = last
        assert node.parent is not None
        node.parent.device_children -= not last
        if host is None:  # then nothing is on the host, behind this page
            self._cut_pages(node, last)
        else:
            node.pages[last] = host
            copies.append((page, host))
            self._host.setdefault(node)
        return page

    def _room_on_host(self) -> int | None:
        """A page of the host, taken from the least recently used end there if need be."""
        if self._spare:
            return self._spare.pop()
        for now in (self._clock(), math.inf):
            for node in self._host:
                if not node.children and node.pinned_until <= now:
                    page = node.pages[-1]
                    self._cut_pages(node, len(node.pages) - 1)
                    if not node.on_host:
                        del self._host[node]
                    return page
        return None

    def _cut_pages(self, node: _Node, count: int) -> None:
        """Leaves a node its first pages; without any it is gone."""
        key = self._key(node.tokens)
        del node.pages[count:], node.tokens[count * self.page_size :]
        if not count:
            assert node.parent is not None
            node.parent.remove(key)
            self._has_bare_roots |= node.parent.parent is None and not node.parent.children

    def _drop_bare_roots(self) -> None:
        if self._has_bare_roots:
            self._has_bare_roots = False
            self._roots = {name: root for name, root in self._roots.items() if root.children}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
