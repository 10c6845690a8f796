"""How good the tuner's choices are, and what they cost.

    python benchmarks/bench_autotune.py replay [--seeds 20]    # anywhere: on spaces measured once
    python benchmarks/bench_autotune.py live [--seconds 200]   # on a GPU: fresh workers, real noise
    python benchmarks/bench_autotune.py writers [--seconds 60] # anywhere: two writers of one store

``replay`` plays the twelve problems whose spaces were measured whole (measure_spaces.py): a worker
answers with the recorded replays of a config, drawn at random, times a drift that all configs of a
process share for a while, and a factor that a config has in this process alone, as
measure_noise.py finds them. It prints, for each problem and way of searching, how far the choice is
from the best config there is, what share of the space was timed, and how often the same config was
chosen. ``live`` runs ``quick`` anew for each seed (live_searches.py). ``writers`` has two
processes write one store, and counts what is lost (store_writers.py); exit code 1 if anything is.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fit_prior
from fit_prior import Measured, measured
from live_searches import search, summarise
from store_writers import TAGS, run_writers

from tilewright.autotune.effort import EFFORTS, Effort
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import Tuned, tune
from tilewright.autotune.space import Config
from tilewright.autotune.tunable import Prepared, Ready, Refused, RunnerSpec
from tilewright.codegen.triton.tuning.tunable import KernelTunable

DRIFT = 0.01  # of a clock that wanders: common to all configs, slow against a round
OFFSET = 0.002  # of a config in a process: where its operands and its code lie


@dataclass(frozen=True)
class Recorded(KernelTunable):
    """A problem whose configs were measured before: nothing is compiled."""

    seconds: Mapping[Config, Sequence[float]] = field(default_factory=dict)

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Those that ran are ready, the others were refused."""
        return {
            c: Ready(str(c)) if c in self.seconds else Refused("it spilled when it was measured")
            for c in configs
        }


class Player:
    """A worker that answers with recorded replays."""

    def __init__(self, recorded: Recorded, seed: int) -> None:
        self.recorded, self.dice, self.drift = recorded, random.Random(seed), 0.0
        self.timed: Counter[Config] = Counter()
        self.offsets: dict[Config, float] = defaultdict(lambda: self.dice.gauss(0, OFFSET))

    def open(self, spec: RunnerSpec) -> None:
        """Nothing to build."""

    def load(self, config: Config) -> None:
        """Nothing to load."""

    def check(self, config: Config) -> float:
        """All that ran were right."""
        return 0.0

    def time(self, config: Config, rounds: int) -> tuple[float, ...]:
        """Recorded replays of a config, with a drift."""
        self.timed[config] += rounds
        found = []
        for _ in range(rounds):
            self.drift = 0.9 * self.drift + self.dice.gauss(0, DRIFT * 0.4)
            seconds = self.dice.choice(self.recorded.seconds[config])
            found.append(seconds * math.exp(self.drift + self.offsets[config]))
        return tuple(found)

    def facts(self) -> Mapping[str, Any]:
        """No device."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


def recorded(problem: Measured) -> Recorded:
    """The tunable of a problem, over its data."""
    t = problem.tunable
    return Recorded(t.template, t.graph, t.sizes, t.target, problem.replays)


def searched(problem: Recorded, effort: Effort, seed: int) -> tuple[Tuned, Player]:
    """One search, and who was asked."""
    player = Player(problem, seed)
    with Pool(start=lambda: player) as pool:
        return tune(problem, effort, pool, seed=seed), player


def at_random(problem: Recorded, count: int, seed: int) -> Config:
    """Random search: as many configs, the least of three replays each."""
    player = Player(problem, seed)
    configs = player.dice.sample(list(problem.seconds), min(count, len(problem.seconds)))
    return min(configs, key=lambda c: statistics.median(player.time(c, 3)))


def loss_of(problem: Measured, config: Config) -> float:
    """How much longer a config takes than the best, by their medians."""
    return problem.seconds[config] / problem.best - 1


def replay(seeds: int) -> None:
    """The table of all problems."""
    print(f"{seeds} searches of each; loss: over the best config's median, mean and worst")
    print(
        f"{'problem':22} {'valid':>5} {'default':>8} | quick: timed   loss  worst same class |"
        f" full:  loss  worst timed | random as many as quick: loss  worst"
    )
    for problem in measured(fit_prior.DATA):
        one = recorded(problem)
        loss = partial(loss_of, problem)
        quick = [searched(one, EFFORTS["quick"], seed) for seed in range(seeds)]
        full = [searched(one, EFFORTS["full"], seed) for seed in range(max(1, seeds // 4))]
        timed = statistics.mean(len(player.timed) for _, player in quick)
        count = round(timed)
        blind = [loss(at_random(one, count, seed)) for seed in range(seeds)]
        chosen = Counter(str(tuned.choice.config) for tuned, _ in quick)
        classes = Counter(tuned.choice.numerics for tuned, _ in quick)
        of_quick = [loss(tuned.choice.config) for tuned, _ in quick]
        of_full = [loss(tuned.choice.config) for tuned, _ in full]
        of_full_timed = statistics.mean(len(player.timed) for _, player in full)
        valid, mean, default = one.space.count(), statistics.mean, loss(one.default)
        print(
            f"{problem.name:22} {valid:5} {default:8.3f} |"
            f" {timed:5.1f} {timed / valid:5.1%} {mean(of_quick):6.3f} {max(of_quick):6.3f}"
            f" {chosen.most_common(1)[0][1]:4} {classes.most_common(1)[0][1]:5} |"
            f" {mean(of_full):6.3f} {max(of_full):6.3f} {of_full_timed:5.0f} |"
            f" {mean(blind):6.3f} {max(blind):6.3f}",
            flush=True,
        )


def writers(seconds: float) -> None:
    """Two writers of one store, and what came of their records."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_writers(Path(folder) / "store.jsonl", seconds)
    each = ", ".join(f"{tag} {count}" for tag, count in zip(TAGS, done.added, strict=True))
    print(f"two processes wrote one store for {seconds:g} s, a third read it {done.reads} times")
    print(f"records added: {each}; written again: {done.replaced}; found: {done.found}")
    print(f"lost, older or damaged: {len(done.wrong)}")
    for line in done.wrong[:10]:
        print(f"  {line}")
    if done.wrong:
        sys.exit(1)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("replay", "live", "writers"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="of live (200) or of writers (60)")
    parser.add_argument("--only", default="")
    parser.add_argument("-o", "--output", type=Path, help="of live: a line for each search")
    options = parser.parse_args()
    seconds: float | None = options.seconds
    actions: dict[str, Callable[[], None]] = {
        "replay": lambda: replay(options.seeds),
        "live": lambda: summarise(
            search(seconds or 200.0, options.only, options.seeds, options.output)
        ),
        "writers": lambda: writers(seconds or 60.0),
    }
    actions[options.what]()


if __name__ == "__main__":
    main()
