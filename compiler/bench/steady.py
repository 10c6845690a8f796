"""The steady part of a generation of many prompts: the steps in which every sequence decodes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .contenders import Batch

_CLOCK = 1e-9  # seconds that sums of differences may be off


@dataclass(frozen=True, slots=True)
class Steady:
    """Steps that all sequences take part in, none of them beginning or ending.

    Attributes:
        sequences: in each step.
        steps: seconds of each.
        prefill: seconds from the prompts to the moment when each has its first token.
        generated: tokens that a sequence has generated when half of the steps are done, mean.
    """

    sequences: int
    steps: tuple[float, ...]
    prefill: float
    generated: float

    @property
    def seconds(self) -> float:
        """Of a step, mean: steps may come to the host in pairs."""
        return statistics.fmean(self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.sequences / self.seconds


def steady_part(batch: Batch, most: int) -> Steady:
    """The first steps, ``most`` of them, behind the first token of the sequence that starts last.

    Raises:
        ValueError: a sequence ends before another has started.
    """
    last = max(batch.stamps, key=lambda stamps: stamps[0])
    end = min(stamps[-1] for stamps in batch.stamps) + _CLOCK
    inside = [stamp for stamp in last if stamp <= end][: most + 1]
    steps = tuple(b - a for a, b in zip(inside, inside[1:], strict=False))
    if not steps:
        raise ValueError("there is no step in which all sequences decode")
    before = statistics.fmean(
        sum(stamp <= last[0] + _CLOCK for stamp in stamps) for stamps in batch.stamps
    )
    return Steady(len(batch.stamps), steps, last[0] - batch.submitted, before + len(steps) / 2)
