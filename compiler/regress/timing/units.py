"""A unit of timing: launches of one kernel on cold operands, captured in a CUDA graph.

Before each unit a buffer larger than L2 is read, so that operands come from memory, and L2 holds
nothing that would have to be written back meanwhile. Short kernels are launched several times in a
unit, each time on operands of its own, so that the clock's step and the start of a graph are small
beside it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ....codegen.base import Kernel
from ....codegen.triton.hand_on import own_results
from .problems import Load, Operands, Problem

UNIT_SECONDS = 60e-6
MOST_LAUNCHES = 32
MOST_BYTES = 1 << 30  # of the copies of one problem's operands
FLUSH_BYTES = 192 << 20
INSTANCES = 4  # of each side
HEAD_START = 3_000_000  # cycles, 1.5 ms
ATTEMPTS = 4  # at a pair for which the host is quick enough
INNER = 3  # timings of each instance behind one pair
_WARM_UPS, _PROBES = 2, 4
_STRIDE = 4099  # rows from one launch to the next


class Flush:
    """Reads more than L2 holds."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.ones(FLUSH_BYTES // 4, device=device)
        self.sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        """Launches the read on the current stream."""
        torch.sum(self.memory, dim=0, out=self.sum)


def operand_sets(problem: Problem, launches: int) -> list[Operands]:
    """Operands for each launch: copies of the problem's, as far as memory goes."""
    if "embedding" in problem.call.origin:
        # Of a table most rows are not read: others are as cold as a copy of it all would be.
        return [_other_rows(problem.operands, index) for index in range(launches)]
    own = sum(x.nbytes for x in problem.operands if x is not None)
    count = max(1, min(launches, MOST_BYTES // max(own, 1)))
    return [problem.operands] + [_copied(problem.operands) for _ in range(count - 1)]


def _copied(operands: Operands) -> Operands:
    return tuple(None if x is None else x.clone() for x in operands)


def _other_rows(operands: Operands, index: int) -> Operands:
    """The operands with other token ids; the largest of them is the table."""
    table = max((x for x in operands if x is not None), key=lambda x: x.nbytes)
    return tuple(
        (x + index * _STRIDE) % len(table) if x is not None and not x.is_floating_point() else x
        for x in operands
    )


def launches_a_unit(problem: Problem, flush: Flush) -> int:
    """How many launches take about UNIT_SECONDS, by a graph of a few of them."""
    graph = capture(problem.kernel, [problem.operands] * _PROBES, problem, Place())
    times: list[float] = []
    for _ in range(_WARM_UPS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / _PROBES)
    return max(1, min(MOST_LAUNCHES, round(UNIT_SECONDS / statistics.median(times[_WARM_UPS:]))))


@dataclass(frozen=True, slots=True)
class Place:
    """Where graphs are captured that are never replayed at once.

    In one pool results lie at the same addresses, and on one stream so does what libraries keep for
    it; else their place in memory would tell old and new apart, by up to 1%.
    """

    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)


def capture(
    kernel: Kernel, sets: Sequence[Operands], problem: Problem, place: Place
) -> torch.cuda.CUDAGraph:
    """The graph of one unit: a launch for each operand set."""
    for _ in range(_WARM_UPS):
        kernel(sets[0], problem.sizes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=place.pool, stream=place.stream):
        for operands in sets:
            kernel(operands, problem.sizes)
    return graph


class PairedUnit:
    """Old and new of one problem, on the same operands.

    Each side is loaded and captured INSTANCES times. Where code, graphs and results come to lie
    makes one instance up to 2% faster than the next, for as long as the process lives: no number of
    repetitions averages that out, other instances do.

    Args:
        problem: of the new engine.
        old, new: load the kernel anew, each time they are called.
        flush: shared by all.

    Attributes:
        launches: in one unit.
        error: largest difference of the results, over their largest magnitude.
    """

    def __init__(self, problem: Problem, old: Load, new: Load, flush: Flush) -> None:
        self.problem, self.flush = problem, flush
        # Kernels make constants and results where and how the runner would have them.
        with torch.inference_mode(), torch.device("cuda"):
            self.error = _difference(problem, old())
            # The graphs hold their addresses.
            self.sets = operand_sets(problem, launches_a_unit(problem, flush))
            self.graphs = [self._instance(old, new) for _ in range(INSTANCES)]
        self.launches = len(self.sets)

    def _instance(self, old: Load, new: Load) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        place = Place()
        first, second = (capture(load(), self.sets, self.problem, place) for load in (old, new))
        return first, second

    def pair(self, generator: random.Random) -> tuple[float, float]:
        """Seconds of one launch, old and new: the mean over the instances of the median of INNER
        timings, in random order.
        """
        plan = [(k, side) for k in range(INSTANCES) for side in (0, 1)] * INNER
        generator.shuffle(plan)
        for _ in range(ATTEMPTS):
            timed, was_ahead = self._run(plan)
            if was_ahead:
                break
        old, new = (
            statistics.mean(statistics.median(timed[k, side]) for k in range(INSTANCES))
            for side in (0, 1)
        )
        return old / 1e3 / self.launches, new / 1e3 / self.launches

    def _run(
        self, plan: Sequence[tuple[int, int]]
    ) -> tuple[dict[tuple[int, int], list[float]], bool]:
        """Milliseconds of units in the order of the plan, and whether the host was ahead of the
        device all the while: else the device has idled within what was timed, for another process
        had the host's core between an event and its graph.
        """
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(len(plan))
        ]
        torch.cuda._sleep(HEAD_START)  # the device waits while the host queues all of it
        begun = torch.cuda.Event()
        begun.record()
        for (instance, side), (begin, end) in zip(plan, events, strict=True):
            self.flush()
            begin.record()
            self.graphs[instance][side].replay()
            end.record()
        was_ahead = not begun.query()
        torch.cuda.synchronize()
        timed: dict[tuple[int, int], list[float]] = {}
        for place, (begin, end) in zip(plan, events, strict=True):
            timed.setdefault(place, []).append(begin.elapsed_time(end))
        return timed, was_ahead


def _difference(problem: Problem, old: Kernel) -> float:
    """How far the two kernels' results are apart; state is written by both, and left out, and so is
    what they hand on to others, which is not always written.
    """
    sides = (kernel(problem.operands, problem.sizes) for kernel in (problem.kernel, old))
    ours, theirs = ([x.double() for x in own_results(problem.call, found)] for found in sides)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and a.data_ptr() != b.data_ptr():
            scale = max(b.abs().max().item(), 1e-30)
            worst = max(worst, (a - b).abs().max().item() / scale)
    return worst
