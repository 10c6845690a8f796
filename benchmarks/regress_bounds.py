"""Bounds of Clopper and Pearson (1934) for a share that was seen in some runs."""

from __future__ import annotations

import math


def binomial_below(k: int, n: int, p: float) -> float:
    """P(X <= k) of n trials with chance p."""
    if p <= 0 or p >= 1:
        return float(p <= 0 or k >= n)
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(math.exp(x) for x in logs))


def upper_bound(k: int, n: int, confidence: float = 0.95) -> float:
    """The largest chance under which k of n or fewer is not yet too unlikely (Clopper-Pearson)."""
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if binomial_below(k, n, middle) > 1 - confidence else (low, middle)
        )
    return high
