"""What a step has computed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import overload

from .plan import Chunk, Plan


class Done(Sequence[Chunk]):
    """What a step has computed for somebody, as chunks; those that decode are made into chunks when
    somebody looks.

    Args:
        plan: of the step.
        void: rows of its decodes that nobody waited for.
        beside: the other chunks.
        num_sampled: tokens that were sampled behind them.

    Attributes:
        num_decoded: tokens of rows that decode.
        num_sampled: tokens that were sampled, those of these rows too.
    """

    def __init__(
        self, plan: Plan, void: Collection[int], beside: list[Chunk], num_sampled: int
    ) -> None:
        self._plan, self._void, self.beside = plan, void, beside
        self.num_decoded = len(plan.positions) - len(void)
        self.num_sampled = self.num_decoded + num_sampled
        self._chunks: list[Chunk] | None = None

    @property
    def num_discarded(self) -> int:
        """Tokens of the step that were computed for nobody."""
        if not self._void and len(self.beside) == len(self._plan.beside):
            return 0
        return self._plan.num_tokens - self.num_tokens

    @property
    def num_tokens(self) -> int:
        """How many were computed."""
        return self.num_decoded + sum([len(chunk.slots) for chunk in self.beside])

    def __len__(self) -> int:
        return self.num_decoded + len(self.beside)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if self._chunks is None:
            rows = self._plan.chunks[: len(self._plan.positions)]
            mine = [chunk for row, chunk in enumerate(rows) if row not in self._void]
            self._chunks = [*mine, *self.beside]
        return self._chunks[index]
