"""Measures whole spaces on a GPU, once: the data that the tuner is judged on.

    python benchmarks/measure_spaces.py -o spaces.jsonl [--only "T=32"] [--seconds 500]

A line is a config: what became of it, and the seconds of a call in each replay. Lines that the
output has already are not measured again, so that a run may be cut into several.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tuning_problems import PROBLEMS

from tilewright.autotune.space import Config
from tilewright.autotune.tunable import Refused
from tilewright.codegen.triton.tuning.runner import KernelRunner
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.targets import Target

ROUNDS = 9
TOOK: Counter[str] = Counter()  # seconds of each part of a config's turn


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="problems whose name has this in it")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--list", action="store_true", help="sizes of the spaces; runs nothing")
    options = parser.parse_args()
    target = Target.parse("h100") if options.list else Target.detect()
    ends = time.monotonic() + options.seconds
    known = _known(options.output)
    for problem in PROBLEMS:
        if options.only not in problem.name:
            continue
        tunable = problem.make(target)
        configs = [c for c in tunable.space.configs() if (problem.name, str(c)) not in known]
        if options.list:
            print(f"{problem.name:22} {tunable.space.count():5} configs, default {tunable.default}")
            continue
        measure(problem.name, tunable, configs, options.output, ends)


def measure(
    name: str, tunable: KernelTunable, configs: list[Config], output: Path, ends: float
) -> None:
    """Compiles all of a problem's configs, then times one after the other."""
    started = time.monotonic()
    if not configs or started > ends:
        return
    prepared = tunable.prepare(configs)
    compiled = time.monotonic() - started
    runner = KernelRunner(tunable.runner.spec)
    seen: dict[str, dict[str, Any]] = {}
    best = float("inf")
    with output.open("a", encoding="utf-8") as file:
        for config in configs:
            if time.monotonic() > ends:
                break
            ready = prepared[config]
            line: dict[str, Any] = {"problem": name, "config": config.to_json()}
            if isinstance(ready, Refused):
                line |= {"status": "refused", "reason": ready.reason}
            elif ready.digest in seen:
                line |= seen[ready.digest]
            else:
                seen[ready.digest] = found = run(runner, config)
                line |= found
                best = min([best, *(ns * 1e-9 for ns in found.get("ns", []))])
            file.write(json.dumps(line) + "\n")
            file.flush()
    took = time.monotonic() - started
    print(
        f"{name:22} {len(configs)} configs, {len(seen)} binaries, compiled in {compiled:.0f} s, "
        f"all in {took:.0f} s; quickest replay {best * 1e6:.2f} us; "
        + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in TOOK.items()),
        flush=True,
    )
    TOOK.clear()


def run(runner: KernelRunner, config: Config) -> dict[str, Any]:
    """What becomes of a config."""
    try:
        started = time.monotonic()
        runner.prepare(config)
        prepared = time.monotonic()
        error = runner.check(config)
        checked = time.monotonic()
        if not error <= 1:
            return {"status": "wrong", "error": error}
        seconds = runner.time(config, 1)
        captured = time.monotonic()
        seconds += runner.time(config, ROUNDS - 1)
        ends = time.monotonic()
        for name, took in (
            ("prepare", prepared - started),
            ("check", checked - prepared),
            ("capture", captured - checked),
            ("rounds", ends - captured),
        ):
            TOOK[name] += took
        return {"status": "ok", "error": error, "ns": [round(s * 1e9) for s in seconds]}
    except RuntimeError as failure:
        return {"status": "failed", "reason": str(failure)[:200]}
    finally:
        runner.graphs.clear()
        runner.kernels.clear()


def _known(output: Path) -> set[tuple[str, str]]:
    if not output.exists():
        return set()
    lines = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return {(line["problem"], str(Config.from_json(line["config"]))) for line in lines}


if __name__ == "__main__":
    main()
