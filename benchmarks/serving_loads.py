"""The loads under which an engine and a peer are compared: the same prompts, at the same times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tilewright.compiler.bench.workloads import (
    Conversation,
    Shape,
    arrival_times,
    random_conversations,
)


@dataclass(frozen=True)
class Load:
    """Requests of 1024 random tokens in and 128 out.

    Attributes:
        name: of the load.
        requests: in all.
        rate: a second, as a Poisson process; infinity for all at once.
        seed: of prompts and arrivals.
    """

    name: str
    requests: int
    rate: float = math.inf
    seed: int = 0

    def draw(self, vocab: int) -> tuple[list[Conversation], list[float]]:
        """What is said, and when, in seconds from the start."""
        rng = np.random.default_rng((self.seed, 0))
        talks = random_conversations(Shape(1024, 128), self.requests, vocab, rng)
        gaps = np.random.default_rng((self.seed, 1))
        return talks, arrival_times(len(talks), self.rate, gaps)


def chosen(rates: str) -> list[Load]:
    """128 requests at once, thrice (the first warms up), and a Poisson load of 12 s at each rate.

    Args:
        rates: requests a second, by commas; may be empty.
    """
    bursts = [Load(name, 128, seed=seed) for seed, name in enumerate(("warm-up", "burst", "burst"))]
    asked = [float(rate) for rate in rates.split(",") if rate]
    poisson = [Load(f"poisson-{rate:g}", round(12 * rate), rate, 7) for rate in asked]
    return bursts + poisson


def summary(
    name: str,
    seconds: float,
    tokens: int,
    ttft: list[float],
    itl: list[float],
) -> dict[str, float | str]:
    """One line of results: tokens a second, and percentiles in milliseconds."""
    found: dict[str, float | str] = {"load": name, "output_tok_s": tokens / seconds}
    for what, values in (("ttft", ttft), ("itl", itl)):
        for share in (50, 90, 99):
            found[f"{what}_p{share}_ms"] = float(np.percentile(values, share)) * 1e3
    found["itl_mean_ms"] = float(np.mean(itl)) * 1e3
    return found


def line(found: dict[str, float | str]) -> str:
    """For reading."""
    rest = (f"{key} {value:.1f}" for key, value in found.items() if isinstance(value, float))
    return f"{found['load']:>12}: " + "  ".join(rest)
