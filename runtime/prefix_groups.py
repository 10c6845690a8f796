"""Which sequences of a decode step begin with the same pages, for attention that reads them once.

Groups are found in the block tables: what the prefix cache and forks share has one page id. Whole
pages count that are full before a sequence's next token; those never change while it runs, so that
groups hold from step to step, as long as the sequences are the same and no page is copied. Then
they are found anew: a sort of the B tables, and B comparisons of neighbours, no more than the
gather of these tables takes.

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
from itertools import chain, pairwise

import numpy as np

_GROUP_SHARE = 8
"""The part of all that groups cost which one more of them does: 2.2 of 20 µs were measured."""

_Group = tuple[tuple[int, ...], int]  # places in the order, pages


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
    # All but the longest may be beginnings of it: no search where even that would be too little.
    if count < 2 or sum(positions) - 2 * max(positions) < least:
        return None
    full = [position // page_size for position in positions]
    pages = [row[:stop].tobytes() for row, stop in zip(tables, full, strict=True)]
    order = sorted(range(count), key=pages.__getitem__)
    ordered, known = tables[order], np.array(full)[order]
    differ = ordered[1:] != ordered[:-1]
    common = np.where(differ.any(axis=1), differ.argmax(axis=1), tables.shape[1])
    shared = np.minimum(common, np.minimum(known[1:], known[:-1])).tolist()
    cost = max(least, 0) // _GROUP_SHARE // page_size
    chosen = _choose(_tree(shared, 0, count - 1), 0, cost, {})
    found = _arrays(order, chosen.groups, page_size)
    return found if chosen.groups and found.pay(sum(positions), least) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """Sequences that begin with the same ``pages``; a leaf is one of them, at its place."""

    pages: int
    children: tuple[_Node, ...] = ()
    place: int = -1


def _tree(shared: list[int], first: int, last: int) -> _Node:
    """Of the places from first to last; ``shared`` pages have each and the next in common."""
    if first == last:
        return _Node(0, place=first)
    pages = min(shared[first:last])
    ends = [place for place in range(first, last) if shared[place] == pages]
    parts = pairwise([first - 1, *ends, last])
    return _Node(pages, tuple(_tree(shared, before + 1, end) for before, end in parts))


@dataclass(frozen=True, slots=True)
class _Choice:
    """Groups below a node: pages that they save less costs, and the places in none of them."""

    saved: int
    alone: tuple[int, ...]
    groups: tuple[_Group, ...] = ()


def _choose(node: _Node, above: int, cost: int, known: dict[tuple[_Node, int], _Choice]) -> _Choice:
    """The best groups below a node.

    Args:
        node: of the tree.
        above: pages that each sequence in none of them saves in a group further up.
        cost: pages that a group costs.
        known: what has been chosen before.
    """
    if not node.children:
        return _Choice(above, (node.place,))
    if (node, above) not in known:
        without = _joined([_choose(child, above, cost, known) for child in node.children])
        inner = _joined([_choose(child, node.pages, cost, known) for child in node.children])
        saved = inner.saved - node.pages - cost  # one of its members reads them
        if saved > without.saved:
            without = _Choice(saved, (), (*inner.groups, (inner.alone, node.pages)))
        known[node, above] = without
    return known[node, above]


def _joined(choices: list[_Choice]) -> _Choice:
    alone = chain.from_iterable(choice.alone for choice in choices)
    groups = chain.from_iterable(choice.groups for choice in choices)
    return _Choice(sum(choice.saved for choice in choices), tuple(alone), tuple(groups))


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
