"""The page ids of all sequences, ready to be handed to a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class BlockTables:
    """Block tables as one growing i32 array, so that a step's tables are one gather of rows."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.data = np.zeros((8, 8), dtype=np.int32)
        self.free_rows = list(range(7, -1, -1))

    def open(self, seq: int) -> None:
        """A row of zeros for a sequence."""
        if not self.free_rows:
            count = self.data.shape[0]
            self.data = np.concatenate([self.data, np.zeros_like(self.data)])
            self.free_rows = list(range(2 * count - 1, count - 1, -1))
        self.rows[seq] = self.free_rows.pop()

    def close(self, seq: int) -> None:
        """Its row may be another one's."""
        row = self.rows.pop(seq)
        self.data[row] = 0
        self.free_rows.append(row)

    def write(self, seq: int, start: int, pages: list[int]) -> None:
        """Puts pages into a sequence's row, from place `start` on."""
        while start + len(pages) > self.data.shape[1]:
            self.data = np.concatenate([self.data, np.zeros_like(self.data)], axis=1)
        self.data[self.rows[seq], start : start + len(pages)] = pages

    def rewrite(self, seq: int, start: int, pages: list[int]) -> None:
        """As `write`, and nothing behind them."""
        self.write(seq, start, pages)
        self.data[self.rows[seq], start + len(pages) :] = 0

    def gather(self, seqs: Sequence[int], width: int) -> Tensor:
        """i32[B, width]: the rows of sequences."""
        rows = [self.rows[seq] for seq in seqs]
        return torch.from_numpy(self.data[:, :width][rows])
