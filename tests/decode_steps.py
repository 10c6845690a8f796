"""Decode steps for tests of their choice: problems of a small model, and workers that time by a
table.
"""

from __future__ import annotations

from contextlib import contextmanager

from fake_backends import InProcess
from persistent_forms import Model
from tilewright.autotune.outcome import CandidateError
from tilewright.autotune.pool import Pool
from tilewright.compiler.decode_tunable import tunable_steps
from tilewright.targets import TARGETS

GRAPH = Model(layers=1).graph()
H100 = TARGETS["h100"]
LENGTH = 64


class FakeSteps:
    """Runs nothing: ``seconds`` by sequences and way; ``faults`` by way."""

    def __init__(self, batch: int, seconds, faults) -> None:
        self.seconds, self.faults = seconds[batch], faults

    def prepare(self, config) -> None:
        if self.faults.get(config["decode"]) == "hangs":
            raise CandidateError("hung", "loading took more than 60 s", breaks=True)

    def check(self, config) -> float:
        return 40.0 if self.faults.get(config["decode"]) == "wrong" else 0.1

    def time(self, config, rounds: int) -> list[float]:
        if self.faults.get(config["decode"]) == "given up":
            raise RuntimeError("call 3 of 12: 7 waits were given up")
        return [self.seconds[config["decode"]]] * rounds

    def facts(self):
        return {"device": "fake"}


def pool(seconds, faults=None) -> Pool:
    """Workers for steps whose seconds are given by number of sequences and way."""

    def build(spec):
        return FakeSteps(spec["batch"], seconds, faults or {})

    return Pool(start=lambda: InProcess(build))


def times(**launch: float):
    """Seconds of both ways: separate kernels take one, one launch of N sequences ``bN``."""
    return {
        batch: {"kernels": 1.0, "persistent": launch.get(f"b{batch}", 2.0)}
        for batch in (1, 2, 4, 8)
    }


@contextmanager
def steps(graph=GRAPH, most: int = 8, length: int = LENGTH, store=None):
    """The steps of a graph on an H100."""
    with tunable_steps(graph, H100, most, length, store) as found:
        yield found


__all__ = ["GRAPH", "H100", "LENGTH", "pool", "steps", "times"]
