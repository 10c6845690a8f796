"""How large a paired difference is: the interval that Wilcoxon's signed-rank test does not reject.

The test (Wilcoxon, Individual comparisons by ranking methods, 1945) is the permutation test that
flips the signs of the differences, applied to their ranks: exact for every symmetric noise,
unimpressed by outliers. Its inversion (Hodges & Lehmann, Estimates of location based on rank tests,
1963) needs the Walsh averages (x_i + x_j) / 2, i <= j, alone: the estimate is their median, and the
ends of the interval are two of their order statistics.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError
from .verdicts import Interval

Floats = NDArray[np.float64]

EXACT_UP_TO = 200
"""Differences up to which the null distribution is exact; beyond, it is as good as normal."""

_CHUNK = 1 << 20  # Walsh averages held at once, 8 MiB: larger ones only fall out of the cache


def signed_rank_interval(differences: ArrayLike, alpha: float) -> Interval:
    """The Hodges-Lehmann estimate of the differences' centre, and its confidence interval.

    Args:
        differences: [n], n >= 1, finite, independent and symmetric around their centre; for the
            ratio of two times, the differences of their logarithms.
        alpha: two-sided; the interval misses the centre with this probability at most.

    Returns:
        The interval; its ends are infinite where n differences cannot decide at this alpha.

    Raises:
        UsageError: no differences, one that is not finite, or an alpha outside (0, 1).
    """
    row = np.asarray(differences, dtype=np.float64)
    if row.ndim != 1:
        raise _refused("one row of numbers", f"an array of shape {row.shape}")
    value, low, high = signed_rank_intervals(row[None, :], alpha)
    return Interval(float(value[0]), float(low[0]), float(high[0]))


def signed_rank_intervals(differences: Floats, alpha: float) -> tuple[Floats, Floats, Floats]:
    """`signed_rank_interval` of each row of [rows, n]: estimates, low ends, high ends, [rows]."""
    rows, n = differences.shape
    if n == 0 or not np.isfinite(differences).all():
        raise _refused("finite numbers, one at least", "none" if n == 0 else "one that is not")
    first, second = _pairs(n)
    step = max(1, _CHUNK // len(first))
    value, low, high = (np.empty(rows) for _ in range(3))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        x = differences[block]
        value[block], low[block], high[block] = _ordered(x[:, first] + x[:, second], n, alpha)
    return value, low, high


def _ordered(sums: Floats, n: int, alpha: float) -> tuple[Floats, Floats, Floats]:
    """Estimates and ends, from twice the Walsh averages, [rows, n (n + 1) / 2]."""
    last = sums.shape[1] - 1
    middle = (last // 2, last - last // 2)
    k = critical_index(n, alpha)
    wanted = middle if k is None else (k, *middle, last - k)
    sums.partition(sorted(set(wanted)), axis=1)
    value = (sums[:, middle[0]] + sums[:, middle[1]]) / 4
    if k is None:
        return value, np.full(len(sums), -np.inf), np.full(len(sums), np.inf)
    return value, sums[:, k] / 2, sums[:, last - k] / 2


@lru_cache(maxsize=4096)
def critical_index(n: int, alpha: float) -> int | None:
    """How many of the lowest Walsh averages lie outside the interval; as many of the highest do.

    It is the largest k with P(W <= k) <= alpha / 2, W the sum of the ranks of the positive signs.

    Args:
        n: differences.
        alpha: two-sided.

    Returns:
        None where even P(W = 0) = 2**-n is larger than alpha / 2.

    Raises:
        UsageError: an alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UsageError(
            "alpha",
            expected="a probability between 0 and 1",
            found=str(alpha),
            remedy="Give the share of intervals that may miss, such as 0.01.",
        )
    if n > EXACT_UP_TO:
        mean, deviation = n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        # W is a whole number: P(W <= k) is the normal's up to k + 1/2.
        k = math.floor(mean - 0.5 + NormalDist().inv_cdf(alpha / 2) * deviation)
    else:
        k = int(np.searchsorted(_cumulative(n), alpha / 2, side="right")) - 1
    return k if k >= 0 else None


def fewest(alpha: float) -> int:
    """The fewest differences that can decide at this two-sided alpha."""
    return max(1, math.ceil(math.log2(2 / alpha)))


@lru_cache(maxsize=EXACT_UP_TO)
def _cumulative(n: int) -> Floats:
    """P(W <= k) for k = 0 .. n (n + 1) / 2: each rank counts or does not, with even chances."""
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, n + 1):
        with_it = chances[:-rank].copy()
        chances[rank:] += with_it
        chances /= 2
    return np.cumsum(chances)


@lru_cache(maxsize=64)
def _pairs(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(n)


def _refused(expected: str, found: str) -> UsageError:
    return UsageError(
        "differences", expected=expected, found=found, remedy="Leave out failed measurements."
    )
