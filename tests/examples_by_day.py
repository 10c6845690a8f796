"""How many random examples a test takes that needs more of them than others."""

from __future__ import annotations

from hypothesis import settings

_USUAL = 10  # of the profile of each day; the nightly one has ten times as many


def examples(by_day: int) -> settings:
    """So many by day, and as many times more as a profile has more than the day's."""
    return settings(max_examples=max(1, by_day * settings.default.max_examples // _USUAL))
