"""What metrics cost the host in each step.

    python benchmarks/bench_metrics.py [--sequences 128] [--json]

Decode steps of a loop whose model is no work. What `Metrics.stepped` takes is what a step pays;
`refresh` is what a scrape pays later, or one step in 256 while nobody scrapes. Medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    Step,
)
from tilewright.runtime.bucketing import Padding
from tilewright.runtime.metrics import Metrics
from tilewright.runtime.prometheus import exposition

ROUNDS = 7
AT_ONCE = 128  # steps between two scrapes: fewer than make `stepped` refresh by itself


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and the load of the machine.

    Attributes:
        sequences: in each step.
        step: of the host in a step, with metrics.
        stepped: of that, in `Metrics.stepped`.
        refresh: of `Metrics.refresh`, for each step that it counts.
        scrape: of an answer in Prometheus' text format, with nothing new.
    """

    sequences: int
    step: float
    stepped: float
    refresh: float
    scrape: float


class NoModel:
    """Steps that are no work."""

    capabilities = Capabilities(mixes=True, pages=True, shares=True, max_slots=None)
    padding = Padding()

    def allocate(self, num_pages: int, page_size: int) -> None:
        """Nothing to allocate."""

    def copy_pages(self, sources: object, destinations: object) -> None:
        """Nothing to copy."""

    def recover(self) -> None:
        """Nothing is given up."""

    def run(self, step: Step) -> torch.Tensor:
        """Token 0 for all."""
        return torch.zeros(len(step.logits_indices), 2)


def _seconds(work: Callable[[], object], times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def measure(sequences: int) -> Cost:
    """The costs with so many sequences."""
    tokens = ROUNDS * AT_ONCE
    pool, executor = PagedPool(sequences * (tokens // 16 + 2) + 1, 16), NoModel()
    scheduler = Scheduler(pool, executor.capabilities, max_num_seqs=sequences)
    loop = GenerationLoop(executor, pool, scheduler, Sampler(), None, [], tokens + 8)
    metrics = Metrics(loop, "none")
    for _ in range(sequences):
        loop.submit([1], SamplingParams(max_new_tokens=tokens + 2))
    loop.step()
    metrics.refresh()
    rounds = []
    for _ in range(ROUNDS):
        step = _seconds(loop.step, AT_ONCE)
        refresh = _seconds(metrics.refresh) / AT_ONCE
        stepped = _seconds(lambda: metrics.stepped((), 0.0, 0.0), AT_ONCE)
        metrics.refresh()
        rounds.append((step, stepped, refresh, _seconds(lambda: exposition(metrics))))
    medians = map(statistics.median, zip(*rounds, strict=True))
    return Cost(sequences, *medians)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cost = measure(options.sequences)
    if options.json:
        print(json.dumps(asdict(cost), indent=1))
        return
    print(
        f"{cost.sequences} sequences: a step of the host {cost.step * 1e6:.0f} µs, of that "
        f"{cost.stepped * 1e6:.2f} µs for metrics; refresh {cost.refresh * 1e6:.1f} µs a step "
        f"that it counts; a scrape {cost.scrape * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
