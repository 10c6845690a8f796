"""Where a band ends: in the widest gap, so that noise moves nobody across its edge."""

from __future__ import annotations

from collections.abc import Iterable


def widest_margin(values: Iterable[float], low: float, high: float) -> float:
    """The point of [low, high] that is furthest from every value: the middle of a gap, or an end.

    With an edge that is fixed a value beside it falls to either side from run to run. This edge
    moves with the values: what must hold is that it lies between the same two of them.

    Args:
        values: where things lie, at least one.
        low, high: where the edge may lie; ``low`` is taken where others are as good.
    """
    given = sorted(values)
    middles = ((a + b) / 2 for a, b in zip(given, given[1:], strict=False))
    points = (low, *(point for point in middles if low < point < high), high)
    return max(points, key=lambda point: min(abs(point - value) for value in given))
