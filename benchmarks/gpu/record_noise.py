"""Records what timings of the very same code look like: old and new are one checkout.

    python benchmarks/gpu/record_noise.py -o benchmarks/results/regress-noise-h100.jsonl

Each session is a process of its own, with allocations of its own. `bench_regress.py` resamples the
file; its format is in `regress_noise.py`. Sessions are appended as they end, so that what was
interrupted is not lost; `--first N` numbers those of another call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from tilewright.compiler.regress.checkout import Checkout
from tilewright.compiler.regress.suite import Suite, load_suite
from tilewright.compiler.regress.timing.pairs import EnginePair, TimedPairs
from tilewright.compiler.regress.timing.session import RULE, prepare_pairs

HERE = Path(__file__).resolve().parents[1]
ALONE = 3  # rounds in which each series is measured alone, for what it costs


def main() -> None:
    """Records sessions, and prints what one takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite", type=Path, default=HERE / "suite.toml")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=540.0, help="Start no session after that.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    suite, here = load_suite(options.suite), Checkout.running()
    pairs = prepare_pairs(suite, here, here)
    print(f"engines ready after {time.monotonic() - started:.0f} s", flush=True)
    for session in range(options.first, options.first + options.sessions):
        if time.monotonic() - started > options.seconds:
            print(f"stopped before session {session}")
            break
        record(pairs, here, session, options.rounds, options.output, suite)


def record(
    pairs: list[EnginePair], here: Checkout, session: int, rounds: int, output: Path, suite: Suite
) -> None:
    """One session: a fresh process, `rounds` pairs of every series."""
    begun = time.monotonic()
    with TimedPairs(pairs, here, here, seed=session) as timed:
        ready = time.monotonic()
        names = list(timed.series)
        header = None
        if not output.exists():
            header = {
                "device": timed.device["name"],
                "versions": timed.device["versions"],
                "clocks": timed.device["clocks"],
                "start_seconds": round(ready - begun, 2),
                "round_seconds": {name: cost(timed, name) for name in names},
                "thresholds": {
                    name: gate(suite, series.subject, series.series)
                    for name, series in timed.series.items()
                },
            }
        ready = time.monotonic()
        taken = [timed.measure(names) for _ in range(rounds)]
        seconds = time.monotonic() - ready
    with output.open("a", encoding="utf-8") as file:
        if header is not None:
            file.write(json.dumps(header) + "\n")
        for name in names:
            old, new = ([round_off(one[name][side]) for one in taken] for side in (0, 1))
            line = {"series": name, "session": session, "old": old, "new": new}
            file.write(json.dumps(line) + "\n")
    print(f"session {session}: {len(names)} series, {rounds} rounds in {seconds:.1f} s", flush=True)


def cost(timed: TimedPairs, name: str) -> float:
    """Seconds that one pair of a series takes."""
    times = []
    for _ in range(ALONE):
        started = time.monotonic()
        timed.measure([name])
        times.append(time.monotonic() - started)
    return round(statistics.median(times), 5)


def gate(suite: Suite, subject: str, series: str) -> float:
    """The slow-down that must be found."""
    allowed = suite.rule(subject, series)[1]
    return allowed.allowed if allowed.relative else RULE.threshold


def round_off(value: float) -> float:
    """Six digits: more is noise, and bytes in the repository."""
    return float(f"{value:.6g}")


if __name__ == "__main__":
    main()
