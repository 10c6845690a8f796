"""Places of sequences that bring one token each to step after step, of which most need no page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .block_tables import BlockTables, TablePatch

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)
NO_PAGES = TablePatch(_NONE, _NONE, _NONE, 0)


class GoingOn:
    """Where the tokens of the same sequences go: one place further than in the step before, but for
    those whose page is full, which is known of all steps to come.

    It holds as long as nobody else writes to the tables (`BlockTables.version`). What a sequence
    writes to is its own by then: it opened the page, or made it its own, in a step before.

    Args:
        tables: of the sequences.
        seqs: the same object at each step.
        slots: i64[B], of their last tokens.
        page_size: tokens of a page.

    Attributes:
        seqs: as given.
        slots: as given, of the last step.
    """

    __slots__ = (
        "_due",
        "_ones",
        "_places",
        "_size",
        "_step",
        "_tables",
        "_version",
        "seqs",
        "slots",
    )

    def __init__(
        self, tables: BlockTables, seqs: tuple[int, ...], slots: NDArray[np.int64], page_size: int
    ) -> None:
        self.seqs, self.slots, self._size = seqs, slots, page_size
        self._tables, self._version, self._step = tables, tables.version, 0
        rows = tables.places(seqs)
        self._places = np.zeros(len(tables.lengths), dtype=np.int64)  # one more token of each
        self._places[rows] = 1
        self._ones = np.ones_like(slots)  # quicker than a number
        # Behind the token at the last place of its page the next one needs a page at once.
        due: dict[int, list[int]] = {}
        for row, step in enumerate((page_size - 1 - slots % page_size).tolist()):
            due.setdefault(step, []).append(row)
        full = -(-tables.lengths[rows] // page_size)  # pages that are full when the next one opens
        self._due: dict[int, _Due] = {}
        for step, some in due.items():
            members, columns = np.array(some, dtype=np.int64), full[some]
            ids = [seqs[row] for row in some]
            self._due[step] = _Due(members, rows[some], columns, int(columns.max()), ids)

    def holds(self, seqs: tuple[int, ...]) -> bool:
        """Whether it is of these, and of how they stand now."""
        return self.seqs is seqs and self._version == self._tables.version

    @property
    def opening(self) -> list[int]:
        """The sequences that need a page for their next token."""
        due = self._due.get(self._step)
        return [] if due is None else due.seqs

    def go_on(self) -> NDArray[np.int64]:
        """The slots i64[B] of the next tokens, if none needs a page."""
        self.slots = slots = self.slots + self._ones
        self._tables.lengths += self._places
        self._step = (self._step + 1) % self._size
        return slots

    def open(self, pages: list[int]) -> tuple[NDArray[np.int64], TablePatch]:
        """The slots i64[B] of the next tokens, for which those `opening` have got these pages, and
        what the tables of all have got.
        """
        due, found = self._due[self._step], np.array(pages, dtype=np.int64)
        due.width += 1
        self._tables.write_each(due.places, due.columns, found, due.width)
        patch = TablePatch(due.rows, due.columns, found, due.width)
        due.columns = due.columns + 1  # another array: the patch keeps its own
        slots = self.go_on()
        slots[due.rows] = found * self._size
        return slots, patch


@dataclass(slots=True)
class _Due:
    """Sequences that open a page in the same steps: their rows here and in the tables, where the
    next page stands there, and the last of these places.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    columns: NDArray[np.int64]
    width: int
    seqs: list[int]
