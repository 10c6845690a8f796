"""Where a series of results changed: E-divisive, and the drift from its beginning to its end.

E-divisive (Matteson & James, A nonparametric approach for multiple change point analysis of
multivariate data, JASA 2014) splits a series where the energy distance between what is before and
what is after is largest, asks by permutation whether order alone could do that, and goes on in the
parts. It assumes no distribution. Here: one variable, the logarithm of the values, so that an
effect is a ratio; distances to the power 1, which has the energy statistic compare the whole
distributions and asks for a finite mean only.

Not by apache-otava, which implements the same idea: it pins an older numpy than ours and wants
clients of clouds and databases, for what are 100 lines here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .signed_rank import fewest, signed_rank_interval
from .verdicts import Interval

Floats = NDArray[np.float64]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """A step in a series.

    Attributes:
        index: of the first value after it.
        before, after: medians of the stretches on both sides, up to the next change points.
        p_value: of the permutation test; it cannot be less than 1 / (permutations + 1).
    """

    index: int
    before: float
    after: float
    p_value: float

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before


def change_points(
    values: Sequence[float] | Floats,
    *,
    max_p: float = 0.01,
    min_effect: float = 0.005,
    min_segment: int = 5,
    permutations: int | None = None,
    seed: int = 0,
) -> tuple[ChangePoint, ...]:
    """The change points of a series, in its order; a slow drift shows as several small steps.

    Args:
        values: [n], finite and positive; time and memory grow with the square of n.
        max_p: a split is kept where permutations do as well with this frequency at most.
        min_effect: the least change of the median, as a fraction, that is told. With enough values
            a step of 0.05% is statistically real, and nobody can act on it: half a percent is what
            two loads of the same code may differ by, and one week of the slowest drift that must
            not go unseen.
        min_segment: the fewest values between two change points: a median of fewer is noise.
        permutations: of the test; None: twice as many as `max_p` asks for at least.
        seed: of the permutations, so that the same series gives the same answer.

    Raises:
        UsageError: values that are not finite and positive, a `max_p` outside (0, 1), a
            `min_segment` below 2, or too few permutations for `max_p`.
    """
    logs = _logs(values)
    permutations = _permutations(max_p, permutations)
    if min_segment < 2:
        raise _misuse("min_segment", "2 values at least", str(min_segment))
    rng = np.random.default_rng(seed)
    found: dict[int, float] = {}
    spans: list[Span] = [(0, len(logs))]
    while True:
        split, q = _best(logs, spans, min_segment)
        if split is None:
            break
        p = _p_value(logs, spans, q, min_segment, max_p, permutations, rng)
        if p is None:
            break
        found[split] = p
        edges = [0, *sorted(found), len(logs)]
        spans = list(zip(edges, edges[1:], strict=False))
    return _large_enough(logs, found, math.log1p(min_effect))


def _best(logs: Floats, spans: Sequence[Span], least: int) -> tuple[int | None, float]:
    """The best split of any span, and its statistic."""
    best: tuple[int | None, float] = (None, -math.inf)
    for start, end in spans:
        if end - start >= 2 * least:
            split, q = best_split(logs[start:end], least)
            if q > best[1]:
                best = (start + split, q)
    return best


def best_split(x: Floats, least: int) -> tuple[int, float]:
    """Where the scaled energy distance of what is before and after is largest, and how large it is.

    As in the paper, what is after may end before the series does: over all `split` and `end`, of
    n = split values before and m = end - split after,

        Q = n m / (n + m) * (2 mean |x - y| - mean |x - x'| - mean |y - y'|)

    with x, x' of what is before, y, y' of what is after; means within are over pairs of different.
    All sums come from the cumulative sums of the matrix of distances, in O(len(x)**2) together.

    Args:
        x: [n], n >= 2 * least.
        least: the fewest values on each side, 2 or more.
    """
    size = len(x)
    sums = np.zeros((size + 1, size + 1))
    np.cumsum(np.abs(x[:, None] - x), axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    of_across, of_before, of_after, nowhere = _coefficients(size, least)
    inside = np.diagonal(sums)  # ordered pairs among the first k, so each pair twice
    before = inside[least : size - least + 1, None]
    across = sums[least : size - least + 1, 2 * least :] - before
    after = inside[2 * least :] - 2 * across - before
    q = of_across * across - of_before * before - of_after * after + nowhere
    row, column = divmod(int(np.argmax(q)), q.shape[1])
    return least + row, float(q[row, column])


@lru_cache(maxsize=16)  # of the spans at hand; the matrices of long ones are large
def _coefficients(size: int, least: int) -> tuple[Floats, Floats, Floats, Floats]:
    """What the three sums weigh in Q, and -inf where what is after would be too short.

    Each is [splits, ends]: splits from `least` to `size - least`, ends from `2 * least` to `size`.
    """
    n = np.arange(least, size - least + 1, dtype=np.float64)[:, None]
    m = np.arange(2 * least, size + 1) - n
    nowhere = np.where(m < least, -np.inf, 0.0)
    m = np.maximum(m, least)
    return 2 / (n + m), m / ((n + m) * (n - 1)), n / ((n + m) * (m - 1)), nowhere


def _p_value(
    logs: Floats,
    spans: Sequence[Span],
    q: float,
    least: int,
    max_p: float,
    permutations: int,
    rng: np.random.Generator,
) -> float | None:
    """How often a random order within each span does as well; None as soon as it is too often."""
    allowed = math.floor(max_p * (permutations + 1)) - 1
    shuffled, as_well = logs.copy(), 0
    # Spans too short to split add nothing.
    spans = [span for span in spans if span[1] - span[0] >= 2 * least]
    for _ in range(permutations):
        for start, end in spans:
            rng.shuffle(shuffled[start:end])
        as_well += _best(shuffled, spans, least)[1] >= q
        if as_well > allowed:
            return None
    return (as_well + 1) / (permutations + 1)


def _large_enough(logs: Floats, found: dict[int, float], least: float) -> tuple[ChangePoint, ...]:
    """Drops the smallest step again and again, until those that are left are all large enough."""
    edges = sorted(found)
    while edges:
        bounds = [0, *edges, len(logs)]
        medians = [float(np.median(logs[a:b])) for a, b in zip(bounds, bounds[1:], strict=False)]
        steps = np.abs(np.diff(medians))
        if steps.min() >= least:
            return tuple(
                ChangePoint(edge, math.exp(before), math.exp(after), found[edge])
                for edge, before, after in zip(edges, medians, medians[1:], strict=False)
            )
        del edges[int(steps.argmin())]
    return ()


def drift(values: Sequence[float] | Floats, alpha: float = 0.01, window: int = 10) -> Interval:
    """The ratio of the newest values to the oldest, which stay pinned, and its interval.

    The signed-rank interval over the pairs (i-th of the first window, i-th of the last), where the
    windows do not overlap: it sees any slow change, however small its steps.

    Args:
        values: [n], finite and positive.
        alpha: two-sided; the ends are (0, inf) where the values are too few for it.
        window: values that the beginning and the end are judged by; more where alpha needs more,
            fewer where the series is shorter than two windows.

    Raises:
        UsageError: fewer than two values, one that is not finite and positive, a wrong alpha.
    """
    logs = _logs(values)
    if len(logs) < 2:
        raise _misuse("values", "two values at least", str(len(logs)))
    if not 0 < alpha < 1:
        raise _misuse("alpha", "a probability between 0 and 1", str(alpha))
    # Two more than the fewest, or a single wild value would already open the interval.
    size = min(max(window, fewest(alpha) + 2), len(logs) // 2)
    log = signed_rank_interval(logs[-size:] - logs[:size], alpha)
    return Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high))


def _permutations(max_p: float, permutations: int | None) -> int:
    if not 0 < max_p < 1:
        raise _misuse("max_p", "a probability between 0 and 1", str(max_p))
    least = math.ceil(1 / max_p) - 1
    if permutations is None:
        return 2 * least + 1
    if permutations < least:
        raise _misuse("permutations", f"{least} or more for p <= {max_p}", str(permutations))
    return permutations


def _logs(values: Sequence[float] | Floats) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    good = np.isfinite(array) & (array > 0)
    if array.ndim != 1 or not good.all():
        found = str(array[~good][0]) if array.ndim == 1 else f"an array of shape {array.shape}"
        raise _misuse("values", "a row of finite positive numbers", found)
    return np.asarray(np.log(array))


def _misuse(culprit: str, expected: str, found: str) -> UsageError:
    return UsageError(culprit, expected=expected, found=found, remedy="Correct the argument.")
