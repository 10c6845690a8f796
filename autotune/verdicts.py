"""What a comparison of old and new can come to, and the interval it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """The outcome of comparing one series.

    ``UNDECIDABLE`` is an outcome of its own: the noise was too large for what was spent.
    ``MISSING``: there is nothing to compare with, or what is watched is gone; never a pass.
    """

    REGRESSION = "regression"
    IMPROVEMENT = "improvement"
    NO_CHANGE = "no change"
    UNDECIDABLE = "not decidable"
    CHANGED = "changed"
    MISSING = "missing"


FAILING = frozenset({Verdict.REGRESSION, Verdict.MISSING})
"""Verdicts that make a comparison fail."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the confidence interval around it; infinite ends say nothing."""

    value: float
    low: float
    high: float
