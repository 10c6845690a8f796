"""Which sequences of a decode step begin with the same pages, for attention that reads them once.

Groups are found in the block tables: what the prefix cache and forks share has one page id. Whole
pages count that are full before a sequence's next token; those never change while it runs, so that
groups hold from step to step, as long as the sequences are the same and no page is copied. Then
they are found anew, if first pages and lengths leave any hope: a sort of the B tables, and B
comparisons of neighbours (0.2 ms for 64 tables of 520 pages, on a CPU).

Sorted, sequences that share stand together, and what neighbours have in common makes a tree: a node
has those that begin with its pages. A group is of a node, and of the sequences behind it that are
in no group of a longer beginning. Of all ways to choose the nodes that have one, that is taken
which saves the most reads. So where sequences share a system prompt, and some of them a document
behind it, the document's have a group of their own if that is worth more.

When it pays. Without groups, the T tokens of all sequences come out of the L2 cache and the U
different ones of them out of memory, both at once: a step's attention takes max(T / l, U / m) with
l and m the rates of the two. With groups it takes U / m, and c for a second kernel, more parts and
their join. L2 is about twice as quick as memory (l = 2 m), so groups pay if T - 2 U is at least
c l. As U is T less what is saved, that is 2 saved - T: sequences in pairs never pay, and what they
have of their own counts against it. benchmarks/NOTES.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_GROUP_SHARE = 8
"""The part of all that groups cost which one more of them does: 2.2 of 20 µs were measured."""

_Group = tuple[list[int], int]  # places in the order, pages


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGroups:
    """Who shares pages, as ``share_pages`` (ir/ops/share_pages.py) takes it.

    Attributes:
        rows: i32[B], the sequences, members of a group together, those of no group last.
        ids: i32[B], the group of each of these, from 1 on, 0 for none.
        pages: i32[B], pages that each sequence shares, 0 for none.
        saved: tokens that members need not read, as another member does.
    """

    rows: np.ndarray
    ids: np.ndarray
    pages: np.ndarray
    saved: int

    def pay(self, num_tokens: int, least: int) -> bool:
        """Whether attention by groups is the quicker one.

        Args:
            num_tokens: of all sequences together.
            least: tokens that are read out of the cache in the time that groups cost.
        """
        return 2 * self.saved - num_tokens >= least


def fewest_sharing(longest: int, least: int) -> int:
    """Sequences of up to ``longest`` tokens whose groups can `pay`: so many at least."""
    return 2 + max(0, -(-least // longest))


def find_groups(
    tables: np.ndarray, positions: Sequence[int], page_size: int, least: int
) -> PrefixGroups | None:
    """The groups of a step that save the most; the longer it goes on, the less they `pay`.

    Args:
        tables: i32[B, M], page ids.
        positions: of each sequence's token, so many are before it.
        page_size: tokens of a page.
        least: as `PrefixGroups.pay` has it.

    Returns:
        None where there are none, or none that pay.
    """
    count = len(positions)
    longest: dict[int, int] = {}
    for page, position in zip(tables[:, 0].tolist(), positions, strict=True):
        longest[page] = max(longest.get(page, 0), position)
    # Those with one first page may have all in common: no search where that would be too little.
    if count < 2 or sum(positions) - 2 * sum(longest.values()) < least:
        return None
    full = [position // page_size for position in positions]
    pages = [row[:stop].tobytes() for row, stop in zip(tables, full, strict=True)]
    order = sorted(range(count), key=pages.__getitem__)
    ordered, known = tables[order], np.array(full)[order]
    differ = ordered[1:] != ordered[:-1]
    common = np.where(differ.any(axis=1), differ.argmax(axis=1), tables.shape[1])
    shared = np.minimum(common, np.minimum(known[1:], known[:-1])).tolist()
    if 2 * page_size * sum(shared) - sum(positions) < least:
        return None
    choice = _Choice(max(least, 0) // _GROUP_SHARE // page_size)
    choice.settle(_tree(shared, 0, count - 1), 0)
    found = _arrays(order, choice.groups, page_size)
    return found if choice.groups and found.pay(sum(positions), least) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """Sequences that begin with the same ``pages``: those at ``places`` in the order, and those of
    the nodes within, which have more in common.
    """

    pages: int
    places: list[int]
    within: list[_Node]


def _tree(shared: list[int], first: int, last: int) -> _Node:
    """Of the places from first to last; ``shared`` pages have each and the next in common."""
    pages = min(shared[first:last])
    ends = [place for place in range(first, last) if shared[place] == pages]
    parts = [(before + 1, end) for before, end in pairwise([first - 1, *ends, last])]
    alone = [start for start, end in parts if start == end]
    return _Node(pages, alone, [_tree(shared, *part) for part in parts if part[0] < part[1]])


class _Choice:
    """Which nodes have a group.

    Args:
        cost: pages that a group costs.

    Attributes:
        groups: those of the trees that were settled.
    """

    def __init__(self, cost: int) -> None:
        self.groups: list[_Group] = []
        self._cost = cost
        self._known: dict[tuple[_Node, int], tuple[int, bool]] = {}

    def settle(self, node: _Node, above: int) -> list[int]:
        """Adds the best groups; the places in none of them.

        Args:
            node: of the tree.
            above: pages that each sequence in none of them is spared in a group further up.
        """
        _, grouped = self._best(node, above)
        places = [*node.places]
        for inner in node.within:
            places += self.settle(inner, node.pages if grouped else above)
        if grouped:
            self.groups.append((places, node.pages))
        return [] if grouped else places

    def _best(self, node: _Node, above: int) -> tuple[int, bool]:
        """The most pages that are saved, less costs, and whether the node has a group then."""
        found = self._known.get((node, above))
        if found is None:
            without = self._all(node, above)
            having = self._all(node, node.pages) - node.pages - self._cost  # one member reads them
            found = self._known[node, above] = max(without, having), having > without
        return found

    def _all(self, node: _Node, spared: int) -> int:
        return spared * len(node.places) + sum([self._best(n, spared)[0] for n in node.within])


def _arrays(order: list[int], groups: Sequence[_Group], page_size: int) -> PrefixGroups:
    groups = sorted(groups, key=lambda group: -len(group[0]))  # the largest first: they fill tiles
    count, place = len(order), 0
    rows, ids = np.zeros(count, np.int32), np.zeros(count, np.int32)
    pages = np.zeros(count, np.int32)
    for number, (places, shared) in enumerate(groups, 1):
        members = [order[one] for one in places]
        rows[place : place + len(members)] = members
        ids[place : place + len(members)] = number
        pages[members] = shared
        place += len(members)
    rows[place:] = np.flatnonzero(pages == 0)
    saved = sum((len(places) - 1) * shared for places, shared in groups)
    return PrefixGroups(rows, ids, pages, saved * page_size)
