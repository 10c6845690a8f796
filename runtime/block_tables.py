"""The page ids and lengths of all sequences, ready to be handed to a step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TablePatch:
    """Pages that rows of block tables have got.

    Args:
        rows, columns: i64[N], where they stand.
        pages: i64[N].
        width: more than any of the columns.
    """

    __slots__ = ("_columns", "_pages", "_places", "_rows", "_stride", "width")

    def __init__(
        self,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        pages: NDArray[np.int64],
        width: int,
    ) -> None:
        self._rows, self._columns, self.width = rows, columns, width
        self._pages, self._stride = pages.astype(np.int32), 0

    def write(self, tables: NDArray[np.int32]) -> None:
        """Brings dense block tables i32[B, M] up to date."""
        assert tables.flags.c_contiguous  # else what follows would write to a copy
        stride = tables.shape[1]
        if stride != self._stride:  # most tables are as wide as those before
            self._places, self._stride = self._rows * stride + self._columns, stride
        tables.reshape(-1)[self._places] = self._pages  # an eighth of what two axes would take


class BlockTables:
    """Block tables as one growing array, so that a step's tables are one gather of rows.

    Attributes:
        rows: of each sequence its row.
        data: i32[R, M], the page ids.
        lengths: i64[R], in tokens, as NumPy has them; `length` is quicker for one.
        version: another one whenever a sequence opens, closes, or is written to by itself.
    """

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.data = np.zeros((8, 8), dtype=np.int32)
        self.free_rows = list(range(7, -1, -1))
        self._grow_lengths(array("q"), 8)
        self.version = 0
        self._last: tuple[Sequence[int], NDArray[np.int64]] | None = None

    def open(self, seq: int) -> None:
        """A row of zeros for a sequence."""
        if not self.free_rows:
            count = self.data.shape[0]
            self.data = np.concatenate([self.data, np.zeros_like(self.data)])
            self._grow_lengths(self._lengths, 2 * count)
            self.free_rows = list(range(2 * count - 1, count - 1, -1))
        self.rows[seq] = self.free_rows.pop()
        self._last = None
        self.version += 1

    def close(self, seq: int) -> None:
        """Its row may be another one's."""
        row = self.rows.pop(seq)
        self.data[row] = 0
        self._lengths[row] = 0
        self.free_rows.append(row)
        self._last = None
        self.version += 1

    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
        return self._lengths[self.rows[seq]]

    def set_length(self, seq: int, length: int) -> None:
        """Notes how many tokens a sequence has."""
        self._lengths[self.rows[seq]] = length
        self.version += 1

    def places(self, seqs: Sequence[int]) -> NDArray[np.int64]:
        """i64[B]: the rows of sequences; of a tuple that was asked for before at once."""
        if self._last is not None and self._last[0] is seqs:
            return self._last[1]
        found = np.array([self.rows[seq] for seq in seqs], dtype=np.int64)
        if isinstance(seqs, tuple):
            self._last = seqs, found
        return found

    def write(self, seq: int, start: int, pages: list[int] | NDArray[np.int64]) -> None:
        """Puts pages into a sequence's row, from place `start` on."""
        self.version += 1
        self._widen(start + len(pages))
        self.data[self.rows[seq], start : start + len(pages)] = pages

    def write_each(
        self,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        pages: list[int] | NDArray[np.int64],
        width: int,
    ) -> None:
        """Puts a page into each of these rows, at a place of its own below `width`; all i64[B], or
        alike as NumPy has it.
        """
        self._widen(width)
        self.data[rows, columns] = pages

    def rewrite(self, seq: int, start: int, pages: list[int]) -> None:
        """As `write`, and nothing behind them."""
        self.write(seq, start, pages)
        self.data[self.rows[seq], start + len(pages) :] = 0

    def gather(self, rows: NDArray[np.int64], width: int) -> Tensor:
        """i32[B, width]: the beginnings of rows."""
        return torch.from_numpy(self.data[:, :width][rows])

    def _widen(self, width: int) -> None:
        while width > self.data.shape[1]:
            self.data = np.concatenate([self.data, np.zeros_like(self.data)], axis=1)

    def _grow_lengths(self, known: array[int], count: int) -> None:
        # An array of Python's, which NumPy looks into: numbers of it are taken thrice as quickly.
        self._lengths = array("q", [*known, *[0] * (count - len(known))])
        self.lengths: NDArray[np.int64] = np.frombuffer(self._lengths, dtype=np.int64)
