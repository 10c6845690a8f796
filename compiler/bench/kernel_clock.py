"""Times those that compute one call in turns: CUDA graphs of a few launches on cold operands."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..regress.timing.problems import Problem
from ..regress.timing.units import (
    ATTEMPTS,
    HEAD_START,
    Flush,
    Place,
    launches_a_unit,
    operand_sets,
)
from .kernel_rivals import Launch, Prepare

OURS = "tilewright"
INNER = 3  # timings of each side behind one figure
WARM_UPS = 2


class Contest(Protocol):
    """Sides of one call, ready to be timed.

    Attributes:
        failed: by side, why it cannot be timed.
    """

    failed: dict[str, str]

    def round(self) -> Mapping[str, float]:
        """Seconds of one launch of each side."""
        ...


class Clock(Protocol):
    """Sets contests up."""

    def enter(self, problem: Problem, sides: Mapping[str, Prepare]) -> Contest:
        """A contest of sides, OURS among them, which may raise; others that fail are left out."""
        ...


class CudaClock:
    """The clock of a CUDA device.

    Args:
        device: where the operands are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.flush = device, Flush(device)
        self.generator = random.Random(0)

    def enter(self, problem: Problem, sides: Mapping[str, Prepare]) -> Contest:
        """Captures each side on the same operands, which are copies as far as memory goes."""
        with torch.no_grad(), torch.device(self.device):
            # Out of inference mode: torch.compile wants normal tensors.
            operands = tuple(None if x is None else x.clone() for x in problem.operands)
            own = replace(problem, operands=operands)
            sets = operand_sets(own, launches_a_unit(own, self.flush))
            found = _CudaContest(len(sets), self.flush, self.generator)
            for name, prepare in sides.items():
                try:
                    found.enter(name, [prepare(each) for each in sets])
                except Exception as error:  # what no graph can hold, or a compiler's own errors
                    if name == OURS:
                        raise
                    text = " ".join(str(error).split())[:200]
                    found.failed[name] = f"{type(error).__name__}: {text}"
        return found


@dataclass(slots=True)
class _CudaContest:
    launches: int
    flush: Flush
    generator: random.Random
    place: Place = field(default_factory=Place)
    graphs: dict[str, torch.cuda.CUDAGraph] = field(default_factory=dict)
    held: list[list[Launch]] = field(default_factory=list)  # graphs know their operands' addresses
    failed: dict[str, str] = field(default_factory=dict)

    def enter(self, name: str, launches: list[Launch]) -> None:
        for _ in range(WARM_UPS):
            launches[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.place.pool, stream=self.place.stream):
            for launch in launches:
                launch()
        self.graphs[name] = graph
        self.held.append(launches)

    def round(self) -> Mapping[str, float]:
        plan = [name for name in self.graphs for _ in range(INNER)]
        self.generator.shuffle(plan)
        for _ in range(ATTEMPTS):
            timed, was_ahead = self._run(plan)
            if was_ahead:
                break
        return {
            name: statistics.median(times) / 1e3 / self.launches for name, times in timed.items()
        }

    def _run(self, plan: list[str]) -> tuple[dict[str, list[float]], bool]:
        """Milliseconds of units in the order of the plan, and whether the host was ahead of the
        device: else the device has idled within what was timed.
        """
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in plan]
        torch.cuda._sleep(HEAD_START)  # the device waits while the host queues all of it
        begun = torch.cuda.Event()
        begun.record()
        for name, (begin, end) in zip(plan, events, strict=True):
            self.flush()
            begin.record()
            self.graphs[name].replay()
            end.record()
        was_ahead = not begun.query()
        torch.cuda.synchronize()
        timed: dict[str, list[float]] = {}
        for name, (begin, end) in zip(plan, events, strict=True):
            timed.setdefault(name, []).append(begin.elapsed_time(end))
        return timed, was_ahead
