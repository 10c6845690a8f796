"""How far the problem and the device of a record are from those that are asked for.

Both distances count factors of two: a record at distance 1 was made for twice the tokens, say, or
on a device with half the bandwidth.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ..errors import UsageError
from ..targets import Target
from .key import Key

UNKNOWN_DEVICE = 8.0  # farther than any two rows of the table of devices are


def comparable(asked: Key, other: Key) -> bool:
    """Whether a config for `other` is one for `asked` too, fast or not.

    Template, its body, the space and the architecture are the same, and so is all of the problem
    that is no size.
    """
    same = ("template", "template_hash", "space_hash", "arch")
    if any(getattr(asked, name) != getattr(other, name) for name in same):
        return False
    return _kinds(asked) == _kinds(other)


def problem_distance(asked: Key, other: Key) -> float:
    """The sum over the sizes of the logarithm, to base 2, of their ratio; 0 counts as 1."""
    theirs = dict(other.problem)
    pairs = ((value, theirs.get(name)) for name, value in asked.problem)
    return sum(
        abs(math.log2(max(1, mine)) - math.log2(max(1, size)))
        for mine, size in pairs
        if isinstance(mine, int) and isinstance(size, int)
    )


@lru_cache
def device_distance(asked: str, other: str) -> float:
    """The logarithms, to base 2, of the ratios of multiprocessors and of bandwidth, summed.

    Args:
        asked, other: devices as `Target.parse` reads them; one that it does not know is
            `UNKNOWN_DEVICE` away from all but itself.
    """
    if asked == other:
        return 0.0
    try:
        one, two = Target.parse(asked), Target.parse(other)
    except UsageError:
        return UNKNOWN_DEVICE
    units = math.log2(one.sms / two.sms)
    return abs(units) + abs(math.log2(one.dram_gb_per_s / two.dram_gb_per_s))


def distance(asked: Key, other: Key) -> float:
    """Of problem and device together."""
    return problem_distance(asked, other) + device_distance(asked.device, other.device)


def _kinds(key: Key) -> list[tuple[str, str | None]]:
    return [(name, value if isinstance(value, str) else None) for name, value in key.problem]
