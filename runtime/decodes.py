"""Sequences that bring one token each to step after step, as arrays over all of them.

While the same sequences go on, what a step is told of them follows from what the step before was
told: positions are one more, streams of random numbers one number further, all else is as it was.
So nothing here costs a statement for each sequence and step.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .lag import Lag
from .request import Sequence
from .sampling import BROKEN, SamplingState

_BLOCK = 16  # steps after which a sequence is asked for more random numbers
_Stream: TypeAlias = tuple[int, SamplingState | None, int]


class Decodes:
    """What is known of sequences of which each brings one token to a step. All of it holds as long
    as none of them joins, ends, is preempted or is left out: then others are made.

    Args:
        seqs: at least one; none is part of it twice.

    Attributes:
        seqs: the rows of its steps.
        ids: of the sequences, a tuple that tells by identity that the rows are the same.
        positions: i64[B], of the tokens of the next step; not to be written to.
        left: how many steps can come behind the next one before a sequence is full; below 0 not
            even that can.
        params: how each row is sampled.
        random: whether any takes random numbers.
        held: whether any waits for a mask.
        stop_ids: tokens that end one of them.
        marks: these, and the token of a row whose logits are broken.
        loud: the rows that are not `quiet`.
        wary: the sequences of which not all steps can sample on the device.
        preemptions: of each, how often it had been preempted.
        lags: whether a token that ends nobody need not be told at once.
    """

    __slots__ = (
        "_asked",
        "_firsts",
        "_lag",
        "_numbers",
        "_ones",
        "_rows",
        "_start",
        "_streams",
        "held",
        "ids",
        "lags",
        "left",
        "loud",
        "marks",
        "params",
        "positions",
        "preemptions",
        "random",
        "seqs",
        "stop_ids",
        "wary",
    )

    def __init__(self, seqs: list[Sequence]) -> None:
        self.seqs, self.ids = seqs, tuple([seq.id for seq in seqs])
        starts = [seq.num_computed for seq in seqs]
        self.positions: NDArray[np.int64] = np.array(starts, dtype=np.int64)
        self._ones = np.ones_like(self.positions)  # quicker than a number
        # The step at `start` samples token start + 1, counted from 0.
        rooms = [seq.limit - start for seq, start in zip(seqs, starts, strict=True)]
        self.left = min(rooms) - 2
        self.params = [seq.sampling.params for seq in seqs]
        self.random = not all([params.is_greedy for params in self.params])
        self.held = any([seq.sampling.matcher is not None for seq in seqs])
        self.stop_ids = frozenset().union(*{seq.request.stop_ids for seq in seqs})
        self.marks = self.stop_ids | {BROKEN}
        self.loud = [row for row, seq in enumerate(seqs) if not seq.quiet]
        self.wary = [seq for seq in seqs if not seq.sampling.always_in_step]
        self.preemptions = [seq.timings.preemptions for seq in seqs]
        self.lags = not (self.held or self.loud or self.wary)
        self._lag: Lag | None = None
        # Numbers f64[B, 2 * _BLOCK] of each row from a step of its own on, once any are asked for.
        self._numbers: NDArray[np.float64] | None = None
        self._firsts: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._start, self._asked = starts[0], 0
        self._rows = np.arange(len(seqs))
        self._streams = [_stream(row, seq) for row, seq in enumerate(seqs)] if self.random else []

    @property
    def lag(self) -> Lag | None:
        """Where their steps are noted; None where each sequence is told."""
        lag = self._lag
        return lag if lag is not None and lag.live else None

    def begin_lag(self, now: float) -> None:
        """From now on their steps are noted together (`Lag`)."""
        self._lag = Lag(self.seqs, now)

    def end_lag(self) -> None:
        """All are told. To be called before any of them goes another way."""
        if self._lag is not None:
            self._lag.end()
            self._lag = None

    def step(self) -> NDArray[np.int64]:
        """The positions i64[B] of the next step's tokens; that is taken then."""
        positions = self.positions
        self.positions = positions + self._ones
        self.left -= 1
        return positions

    def uniform(self, positions: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """The number f64[B] of each stream that the step at these positions takes, 0 of those that
        are greedy; None if all are. A step may be asked for again, as long as none behind it was.
        """
        if not self.random:
            return None
        step = int(positions[0]) - self._start
        if self._numbers is None or not 0 <= step - self._asked <= 1:
            self._numbers = np.zeros((len(self.seqs), 2 * _BLOCK))
            self._firsts = np.full(len(self.seqs), step)
            self._read(self._numbers, self._streams, step)
        else:  # a part of the rows in each step, so that none takes much longer than others
            turn = step % _BLOCK
            self._read(self._numbers, self._streams[turn::_BLOCK], step)
            self._firsts[turn::_BLOCK] = step
        self._asked = step
        return self._numbers[self._rows, step - self._firsts]

    def _read(self, numbers: NDArray[np.float64], streams: list[_Stream], step: int) -> None:
        for row, state, first in streams:
            if state is not None:
                numbers[row] = state.uniforms(first + step, 2 * _BLOCK)

    def full(self, positions: NDArray[np.int64]) -> list[int]:
        """The rows whose sequences are full with what the step at these positions samples."""
        stops = zip(self.seqs, positions.tolist(), strict=True)
        return [row for row, (seq, start) in enumerate(stops) if start + 2 >= seq.limit]


def _stream(row: int, seq: Sequence) -> _Stream:
    """A row, how it is sampled, unless greedily, and which number its first step takes: the step at
    position p samples output token p + 1 - len(prompt).
    """
    state = None if seq.sampling.params.is_greedy else seq.sampling
    return row, state, seq.num_computed + 1 - len(seq.request.prompt)
