"""Places of sequences that bring one token each to step after step, of which most need no page."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .block_tables import BlockTables, TablePatch

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)
_FAR = 256  # steps
NO_PAGES = TablePatch(_NONE, _NONE, _NONE, 0)


class GoingOn:
    """Where the tokens of the same sequences go: one place further than in the step before, but for
    those whose page is full, which is known of all steps to come.

    It holds as long as nobody else writes to the tables (`BlockTables.version`). What a sequence
    writes to is its own by then: it opened the page, or made it its own, in a step before. The
    tables, and the lists of pages that sequences hold, are brought up to date when somebody looks
    at them (`settle`): while these sequences go on, nobody does.

    Args:
        tables: of the sequences.
        seqs: the same object at each step.
        slots: i64[B], of their last tokens.
        page_size: tokens of a page.

    Attributes:
        seqs: as given.
        slots: as given, of the last step.
        num_opening: how many of the sequences need a page for their next token.
    """

    __slots__ = (
        "_due",
        "_next",
        "_ones",
        "_places",
        "_size",
        "_step",
        "_tables",
        "_told",
        "_version",
        "num_opening",
        "seqs",
        "slots",
    )

    def __init__(
        self, tables: BlockTables, seqs: tuple[int, ...], slots: NDArray[np.int64], page_size: int
    ) -> None:
        self.seqs, self.slots, self._size = seqs, slots, page_size
        self._tables, self._version = tables, tables.version
        self._step = self._told = 0
        rows = tables.places(seqs)
        self._places = np.zeros(len(tables.lengths), dtype=np.int64)  # one more token of each
        self._places[rows] = 1
        self._ones = np.ones_like(slots)  # quicker than a number
        # Behind the token at the last place of its page the next one needs a page at once.
        steps: dict[int, list[int]] = {}
        for row, step in enumerate((page_size - 1 - slots % page_size).tolist()):
            steps.setdefault(step, []).append(row)
        full = -(-tables.lengths[rows] // page_size)  # pages that are full when the next one opens
        self._due: list[_Due | None] = [None] * page_size
        for step, some in steps.items():
            members, columns = np.array(some, dtype=np.int64), full[some]
            ids, ones = [seqs[row] for row in some], np.ones_like(members)
            width = int(columns.max())
            due = _Due(members, rows[some], columns, width, ids, ones, page_size * ones)
            self._due[step] = due
        self._look()

    def holds(self, seqs: tuple[int, ...]) -> bool:
        """Whether it is of these, and of how they stand now."""
        return self.seqs is seqs and self._version == self._tables.version

    def go_on(self) -> NDArray[np.int64]:
        """The slots i64[B] of the next tokens, if none needs a page."""
        self.slots = slots = self.slots + self._ones
        self._step += 1
        self._look()
        return slots

    def open(self, pages: NDArray[np.int64]) -> tuple[NDArray[np.int64], TablePatch]:
        """The slots i64[B] of the next tokens, for which as many as `num_opening` have got these
        pages, and what the tables of all get.
        """
        due = self._next
        assert due is not None
        due.width += 1
        patch = TablePatch(due.rows, due.columns, pages, due.width)
        due.missed.append(pages)
        due.columns = due.columns + due.ones  # another array: the patch keeps its own
        slots = self.go_on()
        slots[due.rows] = pages * due.sizes
        return slots, patch

    @property
    def is_far(self) -> bool:
        """Whether what has not been brought up to date should not get more."""
        return self._step - self._told >= _FAR

    def settle(self, held: dict[int, list[int]]) -> None:
        """Brings the tables up to date, and the pages that each sequence holds."""
        steps, self._told = self._step - self._told, self._step
        if not steps:
            return
        self._tables.lengths += steps * self._places
        for due in self._due:
            if due is None or not due.missed:
                continue
            pages, due.missed = np.stack(due.missed, axis=1), []
            columns = due.columns[:, None] + np.arange(-pages.shape[1], 0)
            self._tables.write_each(due.places[:, None], columns, pages, due.width)
            for seq, new in zip(due.seqs, pages.tolist(), strict=True):
                held[seq] += new

    def _look(self) -> None:
        self._next = due = self._due[self._step % self._size]
        self.num_opening = 0 if due is None else len(due.seqs)


@dataclass(slots=True)
class _Due:
    """Sequences that open a page in the same steps: their rows here and in the tables, where the
    next page stands there, and the last of these places; 1 and the page size for each; and pages
    that the tables lack.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    columns: NDArray[np.int64]
    width: int
    seqs: list[int]
    ones: NDArray[np.int64]
    sizes: NDArray[np.int64]
    missed: list[NDArray[np.int64]] = field(default_factory=list)
