"""Statistics of paired measurements: medians, and a confidence interval for the ratio of two."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two medians, and the interval that holds it in 95 of 100 resamples."""

    value: float
    low: float
    high: float


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of medians of pairs measured one after the other.

    The interval is a percentile bootstrap over the pairs (Efron, Bootstrap methods, 1979): drift of
    the machine hits both of a pair. Seeded, so the same figures give the same interval.

    Args:
        numerators, denominators: positive, of one length of at least 1.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    generator = random.Random(0)
    found = sorted(_ratio([generator.choice(pairs) for _ in pairs]) for _ in range(RESAMPLES))
    cut = RESAMPLES * 25 // 1000
    return Ratio(_ratio(pairs), found[cut], found[-1 - cut])


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
