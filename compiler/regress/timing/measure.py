"""The process that measures: ``measure JOB``, where JOB is JSON.

``{"old_code": folder, "seed": n, "pairs": [{"old": engine, "new": engine, "kernels": bool,
"phases": bool, "only": [names]}]}``. The first line that it prints lists the series; it then
answers ``{"measure": [names]}`` with one (old, new) pair each. A name begins with its pair's index.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....errors import UsageError
from ....runtime.engine import CausalLMEngine, load
from ..checkout import Checkout
from .device import device_facts
from .kernels import KernelPairs
from .package import Package
from .phases import PhasePairs, Phases
from .problems import Kernels
from .units import Flush
from .worker import Answer, serve

OLD, NEW = "tilewright_old", (__package__ or "").split(".")[0]


class Bench:
    """All pairs of a job, ready to be timed."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.generator = random.Random(job["seed"])
        self.old = Package(Path(job["old_code"]), OLD)
        self.new = Package(Checkout.running().root, NEW)
        self.flush = Flush(torch.device("cuda"))
        self.kernels: dict[str, KernelPairs] = {}
        self.phases: dict[str, PhasePairs] = {}
        for index, pair in enumerate(job["pairs"]):
            self._enter(str(index), pair)
        # What lives now lives on: the collector need not look at it between two timings.
        gc.collect()
        gc.freeze()
        gc.disable()

    def _enter(self, index: str, pair: Mapping[str, Any]) -> None:
        engine: CausalLMEngine | None = None
        if pair["phases"]:
            new = Phases(self.new, pair["new"])
            self.phases[index] = PhasePairs(Phases(self.old, pair["old"]), new)
            engine = new.engine
        if pair["kernels"]:
            engine = engine or causal_engine(pair["new"])
            old = Kernels(self.old.module("runtime.folder").load_image(pair["old"]), self.old)
            new_kernels = Kernels(engine.image, self.new)
            self.kernels[index] = KernelPairs(engine, old, new_kernels, self.flush, pair["only"])

    def facts(self) -> Answer:
        """The first line."""
        return {
            "kernels": {
                f"{index}/{name}": {"launches": unit.launches, "error": unit.error}
                for index, pairs in self.kernels.items()
                for name, unit in pairs.units.items()
            },
            "phases": [f"{i}/{name}" for i, pairs in self.phases.items() for name in pairs.names],
            "skipped": {
                f"{index}/{name}": reason
                for index, pairs in self.kernels.items()
                for name, reason in pairs.skipped.items()
            },
            "device": device_facts(),
        }

    def answer(self, question: Mapping[str, Any]) -> Answer:
        """One pair of each series named."""
        found: dict[str, tuple[float, float]] = {}
        asked: dict[str, list[str]] = {}
        for name in question["measure"]:
            index, _, rest = name.partition("/")
            asked.setdefault(index, []).append(rest)
        for index, names in asked.items():
            timed = [n for n in names if " @ " in n]
            whole = [n for n in names if " @ " not in n]
            pairs: dict[str, tuple[float, float]] = {}
            if timed:
                pairs.update(self.kernels[index].measure(timed, self.generator))
            if whole:
                pairs.update(self.phases[index].measure(whole, self.generator))
            found.update({f"{index}/{name}": pair for name, pair in pairs.items()})
        return {"pairs": found}


def causal_engine(path: str) -> CausalLMEngine:
    """The engine in a folder; UsageError for one that does not generate."""
    engine = load(path)
    if not isinstance(engine, CausalLMEngine):
        raise UsageError(
            path,
            expected="an engine of a causal language model",
            found="an engine of a plain module",
            remedy="Take the case out of what is timed.",
        )
    return engine


def main(job: str) -> None:
    """Serves until the questions end."""

    def setup() -> tuple[Answer, Any]:
        bench = Bench(json.loads(job))
        return bench.facts(), bench.answer

    serve(setup)


if __name__ == "__main__":
    main(*sys.argv[1:])
