"""Change points against the definition of the statistic, and on steps, drifts and plain noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.change_points import best_split, change_points, drift
from tilewright.errors import UsageError


def q_statistic(before, after):
    """Matteson & James, equations 5 to 7, by their sums; O(n**3) over all splits and ends."""
    n, m = len(before), len(after)
    across = sum(abs(a - b) for a in before for b in after)
    within = [sum(abs(a - b) for a, b in itertools.combinations(x, 2)) for x in (before, after)]
    energy = 2 / (n * m) * across - within[0] / math.comb(n, 2) - within[1] / math.comb(m, 2)
    return n * m / (n + m) * energy


@pytest.mark.quick
@given(
    st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=6, max_size=14),
    st.integers(2, 3),
)
def test_the_best_split_is_that_of_the_definition(values, least):
    x = np.array(values)
    everything = {
        (split, end): q_statistic(values[:split], values[split:end])
        for split in range(least, len(x) - least + 1)
        for end in range(split + least, len(x) + 1)
    }
    split, q = best_split(x, least)
    best = max(everything.values())
    assert q == pytest.approx(best, abs=1e-9)
    of_split = max(v for (s, _), v in everything.items() if s == split)
    assert of_split == pytest.approx(best, abs=1e-9)


def noisy(levels, noise=0.003, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(levels) * np.exp(rng.normal(0, noise, len(levels)))


@pytest.mark.quick
def test_steps_are_found_where_they_are():
    values = noisy([1.0] * 30 + [1.03] * 30 + [0.98] * 25)
    points = change_points(values)
    assert [p.index for p in points] == pytest.approx([30, 60], abs=1)
    assert points[0].ratio == pytest.approx(1.03, abs=0.003)
    assert points[1].before == pytest.approx(1.03, abs=0.003)
    assert points[1].after == pytest.approx(0.98, abs=0.003)
    assert all(p.p_value <= 0.01 for p in points)
    assert points == change_points(values)


def test_a_slow_drift_is_several_steps_up():
    values = noisy(1.005 ** (np.arange(84) / 7))
    points = change_points(values)
    assert len(points) >= 3
    assert all(p.ratio > 1.005 for p in points)


@pytest.mark.quick
def test_noise_alone_seldom_has_a_change_point():
    found = sum(
        bool(change_points(noisy([1.0] * 50, 0.01, seed), min_effect=0.0)) for seed in range(100)
    )
    assert found <= 5  # one in a hundred is what is promised


def test_wild_values_are_not_a_change():
    values = noisy([1.0] * 60)
    values[[7, 31, 50]] *= 3
    assert change_points(values) == ()


@pytest.mark.quick
def test_a_real_step_that_is_too_small_is_not_told():
    values = noisy([1.0] * 60 + [1.003] * 60, 0.0005)
    assert change_points(values) == ()
    (point,) = change_points(values, min_effect=0.001)
    assert point.index == 60


def test_what_is_shorter_than_two_segments_has_none():
    assert change_points([]) == ()
    assert change_points([1.0] * 4 + [2.0] * 5) == ()
    assert change_points([1.0] * 40) == ()
    few = change_points([1.0] * 4 + [2.0] * 5, min_segment=4, max_p=0.05)
    assert [p.index for p in few] == [4]


@pytest.mark.parametrize("better_late", [1.0, 0.995, 1.004])
def test_drift_compares_the_end_with_the_beginning(better_late):
    values = noisy([1.0] * 30 + [1.2] * 30 + [better_late] * 30, 0.001)
    interval = drift(values)
    assert interval.low <= better_late <= interval.high
    assert interval.high - interval.low < 0.004


def test_drift_takes_more_values_where_alpha_asks_for_them():
    values = noisy([1.0] * 30 + [1.1] * 30)
    assert drift(values, alpha=1e-4).low > 1.08
    short = drift(values[25:35], alpha=1e-4)
    assert (short.low, short.high) == (0.0, math.inf)
    assert short.value == pytest.approx(1.1, abs=0.01)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: change_points([1.0, math.nan]), "values"),
        (lambda: change_points([1.0, 0.0]), "values"),
        (lambda: change_points(np.ones((2, 2))), "shape"),
        (lambda: change_points([1.0], max_p=0.0), "max_p"),
        (lambda: change_points([1.0], max_p=0.01, permutations=50), "permutations"),
        (lambda: change_points([1.0], min_segment=1), "min_segment"),
        (lambda: drift([1.0]), "two values"),
        (lambda: drift([1.0, -1.0]), "values"),
        (lambda: drift([1.0, 1.0], alpha=2.0), "alpha"),
    ],
)
def test_what_makes_no_sense_is_refused(call, word):
    with pytest.raises(UsageError, match=word):
        call()
