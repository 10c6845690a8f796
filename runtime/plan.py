"""What one step computes: tokens of sequences, and where their K and V go."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .block_tables import TablePatch
from .decodes import Decodes
from .pool import PageCopy, Slots
from .request import Sequence

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


def _none() -> NDArray[np.int64]:
    return _NONE


@dataclass(slots=True)  # not frozen: making one would take thrice as long
class Chunk:
    """Tokens [start, start + len(slots)) of `seq`, to be computed in one step."""

    seq: Sequence
    start: int
    slots: Slots

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after this."""
        return self.start + len(self.slots) == self.seq.num_tokens

    @property
    def scored(self) -> range:
        """The positions whose logits tell the logprobs of prompt tokens that are still wanted."""
        request = self.seq.request
        if not request.scoring or request.prompt_logprobs is None:
            return range(0)
        stop = min(self.start + len(self.slots), len(request.prompt) - 1)
        return range(max(self.start, len(request.prompt_logprobs) - 1), stop)


@dataclass(slots=True)
class Plan:
    """One step: what to compute, and the page copies to make before.

    Attributes:
        beside: chunks of tokens, behind those of `decodes`.
        copies: in order.
        decodes: sequences of which each brings the token that the step before samples; None if
            there is none.
        positions, slots: i64[B], of these tokens; empty if there is none.
        fills: whether one of these sequences is full with what is sampled.
        opened: what block tables of these sequences have got; None if that is not known.
    """

    beside: list[Chunk] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    decodes: Decodes | None = None
    positions: NDArray[np.int64] = field(default_factory=_none)
    slots: NDArray[np.int64] = field(default_factory=_none)
    fills: bool = False
    opened: TablePatch | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """All of it as chunks, made anew each time."""
        if self.decodes is None:
            return self.beside
        each = zip(self.decodes.seqs, self.positions.tolist(), self.slots.tolist(), strict=True)
        return [*[Chunk(seq, start, [slot]) for seq, start, slot in each], *self.beside]

    @property
    def seqs(self) -> list[Sequence]:
        """Who takes part, in the order of the chunks."""
        first = [] if self.decodes is None else self.decodes.seqs
        return [*first, *[chunk.seq for chunk in self.beside]]

    @property
    def num_sequences(self) -> int:
        """How many take part."""
        return len(self.positions) + len(self.beside)

    @property
    def num_tokens(self) -> int:
        """How many it computes."""
        return len(self.positions) + sum([len(chunk.slots) for chunk in self.beside])

    def decode(self, decodes: Decodes, slots: NDArray[np.int64]) -> None:
        """Gives it a token of each of these sequences, which goes to these slots i64[B]."""
        self.fills = not decodes.left
        self.decodes, self.positions, self.slots = decodes, decodes.step(), slots

    def gathered(self) -> Plan:
        """The same, of chunks that are a last token each, as if they were `decodes`."""
        assert self.decodes is None and self.beside
        plan = Plan(copies=self.copies)
        slots = [int(chunk.slots[0]) for chunk in self.beside]
        decodes = Decodes([chunk.seq for chunk in self.beside])
        plan.decode(decodes, np.array(slots, dtype=np.int64))
        return plan
