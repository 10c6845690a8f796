"""What steps have computed for the same sequences, before any of these is told.

A token changes half a dozen things of its sequence. While the same sequences go on, all of that
follows from the tokens and times of the steps. So these are noted, a statement a step, and the
sequences take what they have missed when somebody asks one of them (`Sequence.tokens` and the
like), or when one joins, ends or starts anew.
"""

from __future__ import annotations

from itertools import pairwise
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .request import Sequence

_KEPT = 256  # steps that nobody has asked after


class Lag:
    """Steps that sequences have not been told of. When it is made each of them is in one step in
    flight, and has all tokens but that one's; their last ones came together. None has a form.

    Any thread may ask; launching, noting and ending are for who holds the loop's lock.

    Args:
        seqs: in the order of the rows.
        now: when their last tokens came, in seconds of the loop's clock.

    Attributes:
        live: whether steps are noted here; not once it has ended.
    """

    __slots__ = ("_launched", "_lock", "_log", "_seqs", "_starts", "_told", "live")

    def __init__(self, seqs: list[Sequence], now: float) -> None:
        self._seqs, self._lock, self.live = seqs, Lock(), True
        self._starts = [len(seq.tokens) for seq in seqs]
        self._launched = 0
        self._told = (0, 0)  # noted and launched steps that all have been told of
        # Tokens and times of steps, how many steps were before them, and the time of the last.
        self._log: tuple[list[NDArray[np.int64]], list[float], int, float] = ([], [], 0, now)
        for seq in seqs:
            seq.lag = self

    def launch(self) -> None:
        """A step is on its way that computes a token of each, and samples the next."""
        self._launched += 1

    def note(self, tokens: NDArray[np.int64], now: float) -> None:
        """A step has sampled these tokens i64[B], one for each sequence."""
        steps, times, before, _ = self._log
        times.append(now)
        steps.append(tokens)  # behind its time: others look at as many as there are of these
        if len(steps) >= _KEPT:
            self.settle()
            with self._lock:
                self._log = [], [], before + len(steps), now

    def settle(self) -> None:
        """Tells all of them."""
        with self._lock:
            steps, times, before, since = self._log
            count, launched, (noted, _) = len(steps), self._launched, self._told
            if self._told == (before + count, launched):
                return
            new = steps[noted - before : count]
            gaps = [b - a for a, b in pairwise([since, *times[:count]])][noted - before :]
            in_flight = 1 + launched - before - count
            columns = np.stack(new, axis=1).tolist() if new else [[]] * len(self._starts)
            for seq, start, tokens in zip(self._seqs, self._starts, columns, strict=True):
                if tokens:
                    seq.catch_up(start + noted, tokens, gaps, times[count - 1])
                seq.counts(start + launched, in_flight)
            self._told = before + count, launched

    def end(self) -> None:
        """Tells all of them, and lets go of them."""
        self.live = False
        self.settle()
        for seq in self._seqs:
            if seq.lag is self:
                seq.lag = None
