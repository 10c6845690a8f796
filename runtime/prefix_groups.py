"""Which sequences of a decode step begin with the same pages, for attention that reads them once.

Groups are found in the block tables: what the prefix cache and forks share has one page id. Whole
pages count that are full before a sequence's next token; those never change while it runs, so that
groups hold from step to step, as long as the sequences are the same and no page is copied. Then
they are found anew: a sort of the B tables, and B comparisons of neighbours, no more than the
gather of these tables takes.

Sorted, sequences that share stand together, and neighbours tell how many pages a run has in common.
Of the ways to cut the order into runs, a cut at the least common neighbours or none, recursively,
the one is taken that saves the most reads (a Cartesian tree of the common lengths). So sequences
that share a system prompt, and some of them a document behind it, are grouped by what is worth
more; a sequence is in one group at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GROUP_COST = 256
"""Tokens whose reads a group of its own costs: rows of a tile that idle, and one part more of each
member to be joined."""

_Run = tuple[int, int, int]  # first, last, pages


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGroups:
    """Who shares pages, as ``share_pages`` (ir/ops/share_pages.py) takes it.

    Attributes:
        rows: i32[B], the sequences, members of a group together, those of no group last.
        ids: i32[B], the group of each of these, from 1 on, 0 for none.
        pages: i32[B], pages that each sequence shares, 0 for none.
        saved: tokens whose keys and values are read once instead of by every member.
    """

    rows: np.ndarray
    ids: np.ndarray
    pages: np.ndarray
    saved: int


def find_groups(
    tables: np.ndarray, positions: Sequence[int], page_size: int, least: int
) -> PrefixGroups | None:
    """The groups of a step that save the most.

    Args:
        tables: i32[B, M], page ids.
        positions: of each sequence's token, so many are before it.
        page_size: tokens of a page.
        least: tokens that all groups together have to save, for attention by groups to pay.

    Returns:
        None where they save less.
    """
    count = len(positions)
    if count < 2 or max(positions) < page_size:
        return None
    order = sorted(range(count), key=[row.tobytes() for row in tables].__getitem__)
    ordered = tables[order]
    differ = ordered[1:] != ordered[:-1]
    common = np.where(differ.any(axis=1), differ.argmax(axis=1), tables.shape[1])
    full = np.asarray(positions)[order] // page_size
    shared = np.minimum(common, np.minimum(full[1:], full[:-1])).tolist()
    _, runs = _best(shared, 0, count - 1, page_size)
    saved = sum((last - first) * pages * page_size for first, last, pages in runs)
    return _arrays(order, runs, saved) if saved >= max(least, 1) else None


def _best(shared: list[int], first: int, last: int, page_size: int) -> tuple[int, list[_Run]]:
    """What the best groups among neighbours save, in tokens less costs, and the groups."""
    if first == last:
        return 0, []
    pages = min(shared[first:last])
    at = shared.index(pages, first, last)
    whole = (last - first) * pages * page_size - _GROUP_COST
    left, left_runs = _best(shared, first, at, page_size)
    right, right_runs = _best(shared, at + 1, last, page_size)
    if whole > 0 and whole >= left + right:
        return whole, [(first, last, pages)]
    return left + right, left_runs + right_runs


def _arrays(order: list[int], runs: list[_Run], saved: int) -> PrefixGroups:
    runs = sorted(runs, key=lambda run: run[0] - run[1])  # the largest first: they fill tiles
    count = len(order)
    rows, ids = np.zeros(count, np.int32), np.zeros(count, np.int32)
    pages = np.zeros(count, np.int32)
    place = 0
    for number, (first, last, shared) in enumerate(runs, 1):
        members = order[first : last + 1]
        rows[place : place + len(members)] = members
        ids[place : place + len(members)] = number
        pages[members] = shared
        place += len(members)
    rows[place:] = np.flatnonzero(pages == 0)
    return PrefixGroups(rows, ids, pages, saved)
