"""Which tokens a row may give, by brute force: what is kept and its distribution function, written
out in float64 and apart from the op and the kernels that are held against it.
"""

from __future__ import annotations

import math
from collections import Counter

import torch


def acceptable(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    epsilon: float = 0.0,
) -> set[int]:
    """The tokens of one row [V] whose interval of the distribution function contains ``uniform``.

    A sum may be off by ``epsilon`` of the whole: where top-p cuts, and where an interval ends.
    With 0 there is one token.
    """
    row = logits.double().tolist()
    best = math.nan if any(map(math.isnan, row)) else max(row)
    if not math.isfinite(best):
        return {-1}
    if not temperature > 0:
        return {row.index(best)}
    scaled = [(x - best) / max(temperature, 1e-30) for x in row]
    least = sorted(scaled, reverse=True)[min(top_k, len(row)) - 1] if top_k > 0 else -math.inf
    floor = math.log(min(min_p, 1.0)) if min_p > 0 else -math.inf
    allowed: set[int] = set()
    for cut in _nuclei([x for x in scaled if x >= least], top_p, epsilon):
        kept = [x if x >= max(least, cut, floor) else -math.inf for x in scaled]
        allowed |= _intervals(kept, uniform, epsilon)
    return allowed


def _nuclei(scaled: list[float], top_p: float, epsilon: float) -> list[float]:
    """Where top-p may cut."""
    if not top_p < 1:
        return [-math.inf]
    counts = Counter(scaled)
    levels = sorted(counts, reverse=True)
    total = math.fsum(map(math.exp, scaled))
    found, before = [], 0.0
    for level in levels:
        after = before + counts[level] * math.exp(level) / total
        first_or_below = level == levels[0] or before < top_p + epsilon
        if first_or_below and (after >= top_p - epsilon or level == levels[-1]):
            found.append(level)
        before = after
    return found


def _intervals(kept: list[float], uniform: float, epsilon: float) -> set[int]:
    weights = list(map(math.exp, kept))
    total = math.fsum(weights)
    goal = min(max(uniform, 0.0), 1 - 2**-24)
    found, before = set(), 0.0
    for token, weight in enumerate(weights):
        after = before + weight / total
        if weight > 0 and before - epsilon <= goal < after + epsilon:
            found.add(token)
        before = after
    return found
