"""Searches on a GPU, each from nothing: whether they end in the same choice, and how good it is.

The tuner's part of a search is a function of times alone; what differs from process to process is
where operands and code lie, and what the device does. So each turn has a worker process of its own,
and an empty store. Candidates are compiled once for all turns: they would be found in the cache.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fit_prior import DATA, measured
from tuning_problems import PROBLEMS

from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import quick_candidates, tune
from tilewright.autotune.space import Config
from tilewright.autotune.tunable import Prepared
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.targets import Target

Row = dict[str, Any]
_PREPARED: dict[tuple[str, Config], Prepared] = {}


class CompiledOnce(KernelTunable):
    """A problem that remembers what became of its configs' compilation."""

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Those that are known, and the others compiled."""
        digest = self.key.digest
        new = [config for config in configs if (digest, config) not in _PREPARED]
        if new:
            _PREPARED.update({(digest, c): one for c, one in super().prepare(new).items()})
        return {config: _PREPARED[digest, config] for config in configs}


def search(seconds: float, only: str, turns: int, output: Path | None) -> list[Row]:
    """Turns of `quick` over the problems, until there are enough or the time is over."""
    ends = time.monotonic() + seconds
    target = Target.detect()
    problems: dict[str, CompiledOnce] = {}
    for problem in PROBLEMS:
        if only in problem.name:
            made = problem.make(target)
            one = CompiledOnce(made.template, made.graph, made.sizes, made.target)
            one.prepare(quick_candidates(one, limit=EFFORTS["quick"].allowed(one.space)))
            problems[problem.name] = one
    rows: list[Row] = []
    for turn in range(turns):
        with Pool() as pool:
            for name, one in problems.items():
                if time.monotonic() > ends:
                    break
                started = time.monotonic()
                choice = tune(one, EFFORTS["quick"], pool, seed=turn).choice
                took = time.monotonic() - started
                row = {"problem": name, "turn": turn, "took": took, **choice.to_json()}
                rows.append(row)
                if output is not None:
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    return rows


def summarise(rows: Sequence[Row]) -> None:
    """A line for each problem: how often the same choice, its gain, and what a better one would."""
    spaces = {problem.name: problem for problem in measured(DATA)}
    print(f"{'problem':32} turns same class   gain  loss (by the whole space)  s a search")
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == name]
        configs = Counter(json.dumps(row["config"]) for row in mine)
        classes = Counter(row["numerics"] for row in mine)
        gains = [row["default_seconds"] / row["seconds"] for row in mine if row["seconds"]]
        known = spaces.get(name)
        losses = [
            known.seconds[config] / known.best - 1
            for row in mine
            if known and (config := Config.from_json(row["config"])) in known.seconds
        ]
        loss = f"{statistics.mean(losses):.3f}, worst {max(losses):.3f}" if losses else "unknown"
        print(
            f"{name:32} {len(mine):5} {configs.most_common(1)[0][1]:4} "
            f"{classes.most_common(1)[0][1]:5}  {statistics.median(gains or [1.0]):.3f}  "
            f"{loss:25}  {statistics.mean(row['took'] for row in mine):.1f}",
            flush=True,
        )
