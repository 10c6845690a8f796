"""The interval of paired differences, against every flip of every sign."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.signed_rank import (
    EXACT_UP_TO,
    critical_index,
    fewest,
    signed_rank_interval,
    signed_rank_intervals,
)
from tilewright.errors import UsageError


def walsh(x):
    return sorted((a + b) / 2 for i, a in enumerate(x) for b in x[i:])


def rejected(x, theta, alpha):
    """The signed-rank test of the centre `theta`, by its definition."""
    shifted = [v - theta for v in x]
    order = sorted(range(len(x)), key=lambda i: abs(shifted[i]))
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    observed = sum(ranks[i] for i, v in enumerate(shifted) if v > 0)
    sums = [
        sum(rank for rank, positive in zip(range(1, len(x) + 1), flips, strict=True) if positive)
        for flips in itertools.product((False, True), repeat=len(x))
    ]
    low = sum(s <= observed for s in sums) / len(sums)
    high = sum(s >= observed for s in sums) / len(sums)
    return min(low, high) <= alpha / 2


@pytest.mark.quick
@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=8, unique=True),
    st.sampled_from([0.01, 0.02, 0.05, 0.11, 0.3]),
)
def test_the_interval_is_what_flipping_signs_does_not_reject(steps, alpha):
    # Powers of three make all Walsh averages distinct, so that no rank is shared.
    x = [s + 3.0**-i for i, s in enumerate(steps, start=1)]
    interval = signed_rank_interval(x, alpha)
    averages = walsh(x)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(averages) if b - a > 1e-9]
    for theta in [averages[0] - 1, *middles, averages[-1] + 1]:
        assert (interval.low < theta < interval.high) is not rejected(x, theta, alpha)
    assert interval.value == pytest.approx(float(np.median(averages)))


@pytest.mark.parametrize("n", [9, 10])
def test_the_interval_of_ten_by_all_flips(n):
    x = list(np.random.default_rng(n).normal(size=n))
    interval = signed_rank_interval(x, 0.02)
    for a, b in itertools.pairwise(walsh(x)):
        theta = (a + b) / 2
        assert (interval.low < theta < interval.high) is not rejected(x, theta, 0.02)


@pytest.mark.parametrize(("n", "alpha", "k"), [(6, 0.05, 0), (10, 0.05, 8), (20, 0.01, 37)])
def test_critical_values_of_the_printed_tables(n, alpha, k):
    assert critical_index(n, alpha) == k


def test_the_null_distribution_by_counting_in_whole_numbers():
    n, alpha = 40, 1e-4
    counts = [1] + [0] * (n * (n + 1) // 2)
    for rank in range(1, n + 1):
        for w in range(len(counts) - 1, rank - 1, -1):
            counts[w] += counts[w - rank]
    below = list(itertools.accumulate(counts))
    k = critical_index(n, alpha)
    assert below[k] * 2 <= alpha * 2**n < below[k + 1] * 2


def test_the_normal_distribution_goes_on_where_the_exact_one_ends():
    for alpha in (0.05, 0.01, 1e-4):
        exact, normal = critical_index(EXACT_UP_TO, alpha), critical_index(EXACT_UP_TO + 1, alpha)
        assert exact < normal < exact * 1.02 + 10


@pytest.mark.quick
@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.01, 6.7e-5, 2**-9])
def test_too_few_differences_say_nothing(alpha):
    enough = fewest(alpha)
    assert critical_index(enough, alpha) is not None
    interval = signed_rank_interval(np.arange(1.0, enough), alpha) if enough > 1 else None
    assert interval is None or (interval.low, interval.high) == (-math.inf, math.inf)


def test_equal_differences_have_a_point_for_an_interval():
    interval = signed_rank_interval([0.25] * 12, 0.01)
    assert (interval.value, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_one_wild_value_moves_the_interval_little():
    x = np.random.default_rng(0).normal(0, 0.01, 30)
    wild = x.copy()
    wild[3] = 50.0
    before, after = signed_rank_interval(x, 0.01), signed_rank_interval(wild, 0.01)
    assert abs(after.value - before.value) < 0.003
    assert after.high - before.high < 0.01


@pytest.mark.parametrize("n", [12, 32, 72])
def test_coverage_is_at_least_what_is_promised_and_not_idle(n):
    rng = np.random.default_rng(n)
    alpha, runs = 0.05, 4000
    for noise in (rng.normal(size=(runs, n)), rng.standard_t(2, size=(runs, n))):
        _, low, high = signed_rank_intervals(noise + 0.7, alpha)
        missed = float(np.mean((low > 0.7) | (high < 0.7)))
        exact = 2 * _below(n, critical_index(n, alpha))
        assert abs(missed - exact) < 4 * math.sqrt(exact * (1 - exact) / runs)
        assert exact <= alpha


def _below(n, k):
    """P(W <= k) from the partitions of each sum into distinct ranks."""
    counts = [1] + [0] * k
    for rank in range(1, n + 1):
        for w in range(k, rank - 1, -1):
            counts[w] += counts[w - rank]
    return sum(counts) / 2**n


def test_rows_are_judged_as_they_are_alone():
    rows = np.random.default_rng(1).normal(size=(5, 400))  # each row a chunk of its own
    value, low, high = signed_rank_intervals(rows, 0.01)
    for i, row in enumerate(rows):
        alone = signed_rank_interval(row, 0.01)
        assert (alone.value, alone.low, alone.high) == (value[i], low[i], high[i])


def test_sixty_differences_take_less_than_a_millisecond():
    x = np.random.default_rng(2).normal(size=60)
    signed_rank_interval(x, 1e-4)
    best = math.inf
    for _ in range(20):
        started = time.perf_counter()
        signed_rank_interval(x, 1e-4)
        best = min(best, time.perf_counter() - started)
    assert best < 1e-3


@pytest.mark.parametrize(
    ("differences", "alpha", "words"),
    [
        ([], 0.01, "none"),
        ([0.1, math.nan], 0.01, "finite"),
        ([0.1, math.inf], 0.01, "finite"),
        ([[0.1]], 0.01, "shape"),
        ([0.1, 0.2], 0.0, "alpha"),
        ([0.1, 0.2], 1.0, "alpha"),
    ],
)
def test_what_cannot_be_judged_is_refused(differences, alpha, words):
    with pytest.raises(UsageError, match=words):
        signed_rank_interval(differences, alpha)
