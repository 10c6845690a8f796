"""A kernel that does not exist: its times come from a formula, its faults are real.

Times are returned, not slept. A hang is a hang, and a crash is a crash: those need a process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from tilewright.autotune.config import Config
from tilewright.autotune.key import Key
from tilewright.autotune.outcome import CandidateError
from tilewright.autotune.space import Choice, Constraint, PowerOfTwo, Space
from tilewright.autotune.tunable import Ready, Refused, RunnerSpec

SPACE = Space(
    (
        PowerOfTwo("block_m", 16, 128),
        PowerOfTwo("block_n", 16, 128),
        Choice("stages", (1, 2, 3)),
        Choice("split_k", (1, 4)),
    ),
    (Constraint("the tile fits", lambda v: v["block_m"] * v["block_n"] <= 8192),),
)
NAMES = SPACE.names


def config(block_m, block_n, stages, split_k=1):
    return Config.of(dict(zip(NAMES, (block_m, block_n, stages, split_k), strict=True)), NAMES)


DEFAULT = config(32, 32, 2)
BEST = config(64, 128, 3)


def seconds(c, best=BEST, gap=0.08, split_k=1.0):
    """A bowl around `best`: each step away from it costs `gap`."""
    steps = sum(abs(math.log2(c[name] / best[name])) for name in ("block_m", "block_n"))
    steps += abs(c["stages"] - best["stages"])
    return 20e-6 * (1 + gap) ** steps * (split_k if c["split_k"] == 4 else 1.0)


class FakeTunable:
    """The bowl as a tunable. `faults` gives the fault of a config by its text."""

    def __init__(self, faults=None, *, twins=(), pinned=(), name="fake", **spec):
        self.faults = {str(c): fault for c, fault in (faults or {}).items()}
        self.twins = dict(twins)
        self.space, self.default, self.name = SPACE, DEFAULT, name
        self.key = Key(name, "0" * 8, SPACE.digest, (("tokens", 16),), "fake device", 90)
        self.spec = {"faults": self.faults, **spec}
        self.runner = RunnerSpec("fake_kernels:runner", self.spec)
        self.prepared = []
        self.pinned = tuple(pinned)

    def prior(self, c):
        """Of the right shape, but two steps beside the truth."""
        return seconds(c, config(64, 64, 2), split_k=1.02)

    def numerics(self, c):
        return f"split_k={c['split_k']}"

    def prepare(self, configs):
        self.prepared += configs
        return {c: self._prepared(c) for c in configs}

    def _prepared(self, c):
        if self.faults.get(str(c)) == "spill":
            return Refused("spills 96 bytes a thread")
        return Ready(str(self.twins.get(c, c)))


class FakeRunner:
    def __init__(self, spec):
        self.spec, self.faults = spec, spec["faults"]
        self.rng = np.random.default_rng(spec.get("seed", 0))
        self.corrupted = False
        self.log = Path(spec["log"]) if "log" in spec else None

    def prepare(self, c):
        if self.faults.get(str(c)) == "oom":
            raise MemoryError("out of memory: 80 GiB wanted")

    def check(self, c):
        if self.spec.get("prints"):
            print("a kernel that prints", flush=True)
            os.write(1, b'{"id": 1, "value": 0}\n')
        fault = self.faults.get(str(c))
        if fault == "ctrl_c":
            os.kill(os.getppid(), signal.SIGINT)
        if fault in ("hang", "ctrl_c"):
            time.sleep(3600)
        if fault == "segv":
            os.write(2, b"last words\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "exit":
            os._exit(3)
        if fault == "corrupt":
            self.corrupted = True
            return 0.1
        if fault == "unlucky" and self.corrupted_before:
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "garbage" or self.corrupted:
            return math.nan
        return 50.0 if fault == "wrong" else 0.1

    corrupted_before = False

    def time(self, c, rounds):
        fault = self.faults.get(str(c))
        if fault == "illegal":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if fault == "interrupt":
            raise KeyboardInterrupt
        if c != DEFAULT:
            self._meet()
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {c}\n")
        t = seconds(c, **self.spec.get("formula", {})) * (1000 if fault == "slow" else 1)
        t *= self.spec.get("factors", {}).get(str(c), 1.0)
        return [
            t * math.exp(self.rng.normal(0, self.spec.get("noise", 0.005))) for _ in range(rounds)
        ]

    def _meet(self):
        """Waits until each process has a candidate: the quicker one would take them all."""
        if (processes := self.spec.get("processes", 1)) > 1:
            Path(f"{self.log}.{os.getpid()}").touch()
            while len(list(self.log.parent.glob(f"{self.log.name}.*"))) < processes:
                time.sleep(0.01)

    def facts(self):
        return {"device": "fake", "sm_mhz": 1980}


class UnluckyRunner(FakeRunner):
    """Its process is poisoned by whoever runs first: "unlucky" then crashes, though it is fine."""

    def check(self, c):
        error = super().check(c)
        type(self).corrupted_before |= c != DEFAULT
        return error


def runner(spec):
    if spec.get("broken"):
        raise RuntimeError("no such device")
    return (UnluckyRunner if spec.get("unlucky") else FakeRunner)(spec)


class InProcess:
    """What a worker does, without a process: for faults that leave it alive."""

    def open(self, spec):
        self.runner = runner(spec.spec)

    def load(self, c):
        self._guarded("load", self.runner.prepare, c)

    def check(self, c):
        return self._guarded("check", self.runner.check, c)

    def time(self, c, rounds):
        return tuple(self._guarded("time", self.runner.time, c, rounds))

    def facts(self):
        return self.runner.facts()

    def close(self):
        pass

    def _guarded(self, phase, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:
            status = "out_of_memory" if isinstance(error, MemoryError) else "failed"
            raise CandidateError(status, str(error), breaks=phase != "load") from error


def true_ratio(chosen, tunable, to=DEFAULT):
    """Of a config's time to another's, by the formula, without noise."""
    formula, factors = tunable.spec.get("formula", {}), tunable.spec.get("factors", {})

    def t(c):
        return seconds(c, **formula) * factors.get(str(c), 1.0)

    return t(chosen) / t(to)


def timed(log):
    """Who timed what, by the log of the runners: {config text: [process, ...]}."""
    found = {}
    for line in Path(log).read_text().splitlines():
        process, _, text = line.partition(" ")
        found.setdefault(text, []).append(int(process))
    return found


def tune_in_process(storage, log, seed):
    """A whole tuning process, one of two; prints the choice and how many candidates it knows of."""
    from tilewright.autotune import search
    from tilewright.autotune.effort import EFFORTS
    from tilewright.autotune.pool import Pool

    search.EXHAUSTIVE_BELOW = 10  # so that most are drawn by the sampler
    effort = replace(EFFORTS["full"], candidates=8, trials=24, rounds=6)
    tunable = FakeTunable(log=log, seed=seed, processes=2)
    with Pool(start=InProcess) as pool:
        tuned = search.tune(tunable, effort, pool, storage=storage)
    print(json.dumps({"choice": tuned.choice.to_json(), "tried": len(tuned.outcomes)}))


if __name__ == "__main__":
    import optuna  # noqa: F401  (so that nothing slow is left between the start and the work)

    print("ready", flush=True)
    sys.stdin.readline()
    tune_in_process(sys.argv[1], sys.argv[2], int(sys.argv[3]))
