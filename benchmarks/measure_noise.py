"""How much the ratio of two configs' times differs from process to process, on a GPU.

    python benchmarks/measure_noise.py -o noise.jsonl [--processes 6] [--only "T=32"]

The best configs of each problem, by the spaces that were measured whole (measure_spaces.py), and
its default are timed in turns, round by round, in fresh processes, and in each of them over two
sets of operands. A line is one set in one process: the seconds of every config in every round. What
the tuner's decision may rest on follows from it (`--summary noise.jsonl`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from fit_prior import DATA, measured

from tilewright.autotune.space import Config
from tilewright.autotune.worker import Worker
from tilewright.codegen.triton.tuning.tunable import KernelTunable

BEST, ROUNDS, SETS = 6, 32, 2


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--only", default="", help="problems whose name has one of these in it")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--summary", type=Path)
    options = parser.parse_args()
    if options.summary:
        summarise(options.summary)
        return
    names, ends = options.only.split(","), time.monotonic() + options.seconds
    chosen = [p for p in measured(DATA) if any(name in p.name for name in names)]
    finalists = {}
    for problem in chosen:
        ranked = sorted(problem.seconds, key=lambda c: problem.seconds[c])[:BEST]
        finalists[problem.name] = list(dict.fromkeys([problem.tunable.default, *ranked]))
        problem.tunable.prepare(finalists[problem.name])
    with options.output.open("a", encoding="utf-8") as file:
        for process in range(options.processes):
            for problem in chosen:
                if time.monotonic() > ends:
                    return
                for row in timed(problem.tunable, finalists[problem.name]):
                    file.write(json.dumps({"problem": problem.name, "process": process} | row))
                    file.write("\n")
                file.flush()


def timed(tunable: KernelTunable, configs: list[Config]) -> list[dict[str, Any]]:
    """Rounds of one fresh process, a row for each set of operands."""
    worker, rows = Worker(), []
    try:
        for number in range(SETS):
            worker.open(tunable.runner)
            for config in configs:
                worker.load(config)
            seconds: dict[str, list[float]] = defaultdict(list)
            for turn in range(ROUNDS):
                order = configs[turn % len(configs) :] + configs[: turn % len(configs)]
                for config in order:
                    seconds[str(config)].append(float(f"{worker.time(config, 1)[0]:.5g}"))
            rows.append({"set": number, "seconds": seconds, "facts": worker.facts()})
    finally:
        worker.close()
    return rows


def summarise(path: Path) -> None:
    """Standard deviations of the log ratios to the default: in a set, between sets, processes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print(
        "problem                config: ratio to the first, % in a round | of a set | of a process"
    )
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == name]
        first, *others = mine[0]["seconds"]
        for config in others:
            of_sets: dict[int, list[float]] = defaultdict(list)
            inside = []
            for row in mine:
                pairs = zip(row["seconds"][config], row["seconds"][first], strict=True)
                logs = [math.log(a / b) for a, b in pairs]
                inside.append(statistics.stdev(logs))
                of_sets[row["process"]].append(statistics.median(logs))
            sets = [statistics.stdev(found) for found in of_sets.values() if len(found) > 1]
            means = [statistics.mean(found) for found in of_sets.values()]
            between = statistics.stdev(means) if len(means) > 1 else math.nan
            ratio = math.exp(statistics.mean(means))
            of_a_set = math.hypot(*sets) / len(sets) ** 0.5
            print(
                f"{name:22} {ratio:.4f} {statistics.mean(inside):7.2%} {of_a_set:7.2%} "
                f"{between:7.2%}  {min(means):+.4f} {max(means):+.4f} {config}"
            )


if __name__ == "__main__":
    main()
