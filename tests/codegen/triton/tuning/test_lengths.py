"""Lengths that decode attention is timed on: mixed, and a function of the seed."""

from __future__ import annotations

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.triton.tuning.lengths import (
    longest,
    mean_length,
    mixed_lengths,
    most_pages,
)

STEPS = {
    "sequences": st.sampled_from([1, 8, 32, 128]),
    "page": st.sampled_from([1, 12, 16, 256]),
    "capacity": st.sampled_from([8, 256, 2048, 8192]),
}


@given(seed=st.integers(0, 63), **STEPS)
def test_lengths_lie_between_a_page_and_the_capacity_and_fit_the_pages(
    sequences: int, page: int, capacity: int, seed: int
) -> None:
    lengths = mixed_lengths(sequences, page, capacity, seed)
    assert lengths == mixed_lengths(sequences, page, capacity, seed)
    assert len(lengths) == sequences
    assert all(min(page, capacity) <= length <= capacity for length in lengths)
    assert sum(-(-length // page) for length in lengths) <= most_pages(sequences, page, capacity)
    assert longest(sequences, page, capacity) <= capacity


@pytest.mark.parametrize("sequences", [1, 8, 128])
def test_the_seeds_that_are_timed_are_log_uniform_together(sequences: int) -> None:
    lengths = [n for seed in range(8) for n in mixed_lengths(sequences, 16, 8192, seed)]
    assert mean(lengths) == pytest.approx(mean_length(16, 8192), rel=0.05)
    for low in (16, 128, 1024):
        within = sum(low <= length < 8 * low for length in lengths)
        assert within / len(lengths) == pytest.approx(1 / 3, abs=0.1)


def test_results_are_checked_on_long_sequences() -> None:
    assert mixed_lengths(1, 16, 8192, 0)[0] > 4096
    orders = {tuple(mixed_lengths(8, 16, 8192, seed)) for seed in range(4)}
    assert len(orders) == 4 and any(list(order) != sorted(order) for order in orders)
