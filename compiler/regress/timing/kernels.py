"""Kernels of two engines, each loaded by its own code, timed on the same operands."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from ....runtime.engine import CausalLMEngine
from ...bench.decoding import decode_runner
from .problems import Kernels, Problem, record_problems
from .steps import DECODES, SETTINGS, fits
from .units import Flush, PairedUnit

WRONG = 0.1
"""Results further apart than this, relative to the largest, are not two speeds of one thing."""


class KernelPairs:
    """Every kernel of a pair of engines, ready to be timed.

    Args:
        engine: the new one, running.
        old, new: kernels of both.
        flush: shared by all.
        only: names to keep, all if empty: what is not asked for needs no memory.

    Attributes:
        units: by name.
        skipped: what cannot be timed, with the reason.
    """

    def __init__(
        self, engine: CausalLMEngine, old: Kernels, new: Kernels, flush: Flush, only: Sequence[str]
    ) -> None:
        self.units: dict[str, PairedUnit] = {}
        self.skipped: dict[str, str] = {}
        self.old, self.new, self.flush = old, new, flush
        assert engine.image.lm is not None
        for setting in (s for s in SETTINGS if fits(s, engine.image.lm)):
            runner = decode_runner(engine) if setting.name.startswith(DECODES) else engine.runner
            for problem in record_problems(engine, setting, runner):
                name = f"{problem.subject} @ {problem.setting}"
                if not only or name in only:
                    self._enter(name, problem)

    def _enter(self, name: str, problem: Problem) -> None:
        load = self.old.of(problem)
        if isinstance(load, str):
            self.skipped[name] = load
            return
        device = next(x.device for x in problem.operands if x is not None)
        try:
            unit = PairedUnit(
                problem, load, lambda: self.new.load(problem.call, device), self.flush
            )
        except Exception as error:  # what no graph can hold; the old code's own classes too
            text = " ".join(str(error).split())[:200]
            self.skipped[name] = f"{type(error).__name__}: {text}"
            return
        if unit.error > WRONG:
            self.skipped[name] = f"results differ by {unit.error:.2g} of the largest"
        else:
            self.units[name] = unit

    def measure(
        self, names: Sequence[str], generator: random.Random
    ) -> Mapping[str, tuple[float, float]]:
        """One pair of each series named, in random order."""
        order = generator.sample(list(names), len(names))
        return {name: self.units[name].pair(generator) for name in order}
