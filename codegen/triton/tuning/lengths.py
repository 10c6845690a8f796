"""How long the sequences of a decode step are when attention is timed: what is tuned for is a step
as a server sees it, where a few are long and most are not.
"""

from __future__ import annotations

import math

import torch

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples fill [0, 1) evenly, however many there are
_FIRST = 0.95


def mixed_lengths(sequences: int, page: int, capacity: int, seed: int) -> list[int]:
    """Lengths in tokens, log-uniform between a page and the capacity, a function of the arguments.

    They are drawn systematically: one out of each ``sequences``-th of the distribution, at a place
    that moves evenly with the seed. So steps of many sequences are alike, and the steps of a few
    seeds, together, are as mixed for one sequence as for many. Seed 0, whose results are checked,
    has nearly the longest. Long and short stand in any order.
    """
    place = (_FIRST + seed * _GOLDEN) % 1.0
    shares = [(index + place) / sequences for index in range(sequences)]
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    return [_length(shares[index], page, capacity) for index in order.tolist()]


def most_pages(sequences: int, page: int, capacity: int) -> int:
    """Pages that hold the sequences of any seed."""
    ends = (_length((index + 1) / sequences, page, capacity) for index in range(sequences))
    return sum(-(-end // page) for end in ends)


def mean_length(page: int, capacity: int) -> float:
    """The mean of the distribution."""
    if capacity <= page:
        return float(capacity)
    return (capacity - page) / math.log(capacity / page)


def longest(sequences: int, page: int, capacity: int) -> int:
    """Of a step, in the middle of where it may be."""
    return _length(1 - 0.5 / sequences, page, capacity)


def _length(share: float, page: int, capacity: int) -> int:
    low = min(page, capacity)
    return min(capacity, max(1, round(low * math.pow(capacity / low, share))))
