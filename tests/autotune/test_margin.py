"""The edge of a band: as far from every value as its bounds allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.margin import widest_margin

VALUES = st.lists(st.floats(0, 0.1), min_size=1, max_size=8)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("values", "edge"),
    [
        ([0.0], 0.02),  # nobody near: the far end
        ([0.0, 0.02], 0.01),
        ([0.0, 0.009], 0.02),
        ([0.0, 0.012, 0.018], 0.015),
        ([0.0, 0.016], 0.01),  # the middle of the gap is out of bounds
        ([0.05], 0.01),
    ],
)
def test_where_the_edge_is(values, edge):
    assert widest_margin(values, 0.01, 0.02) == pytest.approx(edge)


@given(VALUES)
def test_no_other_edge_is_further_from_all(values):
    edge = widest_margin(values, 0.01, 0.02)
    assert 0.01 <= edge <= 0.02
    margin = min(abs(edge - value) for value in values)
    others = (0.01 + 0.01 * step / 200 for step in range(201))
    assert all(min(abs(o - v) for v in values) <= margin + 1e-12 for o in others)
