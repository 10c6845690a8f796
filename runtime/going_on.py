"""Places of sequences that bring one token each to step after step, of which most need no page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .block_tables import BlockTables

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


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
        "_places",
        "_rows",
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
        self._rows = tables.places(seqs)
        self._places = np.zeros(len(tables.lengths), dtype=np.int64)  # one more token of each
        self._places[self._rows] = 1
        # Behind the token at the page's last place the next one needs a page at once.
        steps = (page_size - 1 - slots % page_size).tolist()
        due: dict[int, list[int]] = {}
        for row, step in enumerate(steps):
            due.setdefault(step, []).append(row)
        self._due = {step: np.array(rows, dtype=np.int64) for step, rows in due.items()}

    def holds(self, seqs: tuple[int, ...]) -> bool:
        """Whether it is of these, and of how they stand now."""
        return self.seqs is seqs and self._version == self._tables.version

    @property
    def opening(self) -> NDArray[np.int64]:
        """The rows that need a page for their next token."""
        return self._due.get(self._step, _NONE)

    def go_on(self, pages: Sequence[int] = ()) -> NDArray[np.int64]:
        """The slots i64[B] of the next tokens, for which those `opening` have got these pages."""
        tables, slots = self._tables, self.slots + 1
        if pages:
            opening, found = self.opening, np.array(pages, dtype=np.int64)
            rows = self._rows[opening]
            slots[opening] = found * self._size
            tables.write_each(rows, tables.lengths[rows] // self._size, found)
        tables.lengths += self._places
        self._step = (self._step + 1) % self._size
        self.slots = slots
        return slots
