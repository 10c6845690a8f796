"""Fits the constants of the tuner's prior to whole spaces that were measured once, and shows how it
ranks the problems that it has not seen.

    python benchmarks/fit_prior.py [--data results/….jsonl] [--steps 3000] [--check]

A random walk over the constants of each template, seeded; what is made small is how far the best of
the prior's first 1, 5 and 10 configs is from the best there is. ``--check`` only prints the table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tuning_problems import EARLIER_PROBLEMS, PROBLEMS, Named

from tilewright.autotune.prior import Constants, Work, predict
from tilewright.autotune.space import Config
from tilewright.codegen.triton.tuning.beside_library import CANDIDATE, is_library, of_ours
from tilewright.codegen.triton.tuning.registry import TEMPLATES
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.targets import TARGETS, Target

RESULTS = Path(__file__).parent / "results"
DATA = RESULTS / "2026-11-27-h100-spaces-2.jsonl.gz"
EARLIER = RESULTS / "2026-11-27-h100-spaces.jsonl.gz"
"""Of other problems, noisier, without the libraries: they only help to fit."""

H100 = TARGETS["h100"]
FIRST = (1, 5, 10)
WEIGHTS = (1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Measured:
    """A problem whose space was measured.

    Attributes:
        name, held_out: of the problem.
        tunable: it.
        seconds: median of each config that ran; refused ones are left out, as they are when tuning.
        works: what each of them does that is a kernel of ours.
        replays: seconds in each replay.
    """

    name: str
    held_out: bool
    tunable: KernelTunable
    seconds: Mapping[Config, float]
    works: Mapping[Config, Work]
    replays: Mapping[Config, tuple[float, ...]]

    @property
    def best(self) -> float:
        """The least of the medians."""
        return min(self.seconds.values())

    def regrets(self, constants: Constants) -> list[float]:
        """How far the best of the prior's first configs is from the best, 0 for none."""
        order = sorted(self.works, key=lambda c: predict(self.works[c], H100, constants))
        best = min(self.seconds[c] for c in order)
        return [min(self.seconds[c] for c in order[:n]) / best - 1 for n in FIRST]


def measured(
    data: Path, problems: Sequence[Named] = PROBLEMS, target: Target = H100
) -> list[Measured]:
    """Those of the problems that the data has."""
    replays: dict[str, dict[Config, tuple[float, ...]]] = defaultdict(dict)
    for line in map(json.loads, gzip.decompress(data.read_bytes()).splitlines()):
        if line["status"] == "ok":
            config = Config.from_json(line["config"])
            replays[line["problem"]][config] = tuple(ns * 1e-9 for ns in line["ns"])
    found = []
    for problem in problems:
        if problem.name not in replays:
            continue
        tunable = problem.make(target)
        own = {_config(tunable, c): times for c, times in replays[problem.name].items()}
        seconds = {config: statistics.median(times) for config, times in own.items()}
        works = {
            config: tunable.template.work(tunable.node, config, tunable.sizes, target)
            for config in seconds
            if not is_library(config)
        }
        found.append(Measured(problem.name, problem.held_out, tunable, seconds, works, own))
    return found


def _config(tunable: KernelTunable, config: Config) -> Config:
    """A config of data that may be older than the libraries in the space."""
    before = CANDIDATE in tunable.space.names and config.get(CANDIDATE) is None
    return of_ours(config.as_dict()) if before else config


def loss(problems: Sequence[Measured], constants: Constants) -> float:
    """Mean of the weighted regrets."""
    rows = (problem.regrets(constants) for problem in problems)
    return statistics.mean(sum(w * r for w, r in zip(WEIGHTS, row, strict=True)) for row in rows)


def fit(problems: Sequence[Measured], start: Constants, steps: int) -> Constants:
    """The best constants of a seeded random walk."""
    dice = random.Random(0)
    best, least = start, loss(problems, start)
    names = [field.name for field in fields(Constants)]
    for _ in range(steps):
        changed = {
            name: getattr(best, name) * math.exp(dice.gauss(0, 0.4))
            for name in dice.sample(names, dice.choice((1, 2, 3)))
        }
        tried = replace(best, **changed)
        if (found := loss(problems, tried)) < least:
            best, least = tried, found
    return best


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    problems = measured(options.data)
    fitted = [*(p for p in problems if not p.held_out), *measured(EARLIER, EARLIER_PROBLEMS)]
    constants = {template.name: template.constants for template in TEMPLATES}
    if not options.check:
        for template in TEMPLATES:
            own = [p for p in fitted if p.tunable.template is template]
            if not own:  # no space of it is measured yet
                continue
            constants[template.name] = fit(own, template.constants, options.steps)
            rounded = {n: float(f"{v:.3g}") for n, v in asdict(constants[template.name]).items()}
            print(template.name, rounded)
    print(f"{'problem':22} default   best of the prior's first {FIRST}, over the best")
    for p in problems:
        row = p.regrets(constants[p.tunable.template.name])
        default = p.seconds[p.tunable.default] / p.best
        held = "held out" if p.held_out else ""
        print(f"{p.name:22} {default:7.3f}   {'  '.join(f'{1 + r:.3f}' for r in row)}  {held}")


if __name__ == "__main__":
    main()
