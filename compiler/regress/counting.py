"""Work of Python counted rather than timed: calls of our own functions, the same on every machine.

What others' code calls within itself is left out: it has its own caches, and reads the environment.
So are ``settings``, which reads it for us, and this package, which looks on.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, TypeVar

from ...passes.driver import run_passes
from ..api import Phases

T = TypeVar("T")
_PACKAGE = __name__.split(".", 1)[0]
_APART = (f"{_PACKAGE}.settings", __name__.rsplit(".", 1)[0])
PYTHON = ".".join(map(str, sys.version_info[:2]))
"""The Python that counts: others inline comprehensions, and so make fewer calls."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What some work came to.

    Attributes:
        calls: how often a function of ours was entered, or a generator of ours resumed.
        c_calls: how often one of ours called a function that is written in C.
        passes: the calls within each pass of the pipeline, by its name.
    """

    calls: int = 0
    c_calls: int = 0
    passes: Mapping[str, int] = field(default_factory=dict)


def count_calls(work: Callable[[], T], package: str = _PACKAGE) -> tuple[T, Counts]:
    """The result of ``work``, and what it came to on this thread.

    Args:
        work: what to do.
        package: whose functions are counted.
    """
    profile = _Profile(package)
    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # it would end generators of others' cycles in our time, now and then
    sys.setprofile(profile)
    try:
        result = work()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return result, Counts(profile.calls, profile.c_calls, dict(profile.passes))


class _Profile:
    """What `sys.setprofile` calls."""

    def __init__(self, package: str) -> None:
        self.package, self.inside = package, f"{package}."
        self.calls = self.c_calls = 0
        self.passes: Counter[str] = Counter()
        self.current: str | None = None
        self.known: dict[CodeType, bool] = {}
        self.driver = run_passes.__code__
        self.own = count_calls.__code__

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if self._counts(frame):
                self._entered(frame)
        elif event == "c_call" and frame.f_code is not self.own and self._counts(frame):
            self.c_calls += 1

    def _entered(self, frame: FrameType) -> None:
        self.calls += 1
        caller = frame.f_back
        if frame.f_code is self.driver:
            self.current = None
        elif caller is not None and caller.f_code is self.driver:
            step = caller.f_locals.get("step")  # the pass whose turn it is
            self.current = getattr(step, "name", None)
        if self.current is not None:
            self.passes[self.current] += 1

    def _counts(self, frame: FrameType) -> bool:
        code = frame.f_code
        known = self.known.get(code)
        if known is None:
            name = str(frame.f_globals.get("__name__", ""))
            known = name == self.package or name.startswith(self.inside)
            known = self.known[code] = known and not name.startswith(_APART)
        return known


class CountedPhases(Phases):
    """Phases of compiling that count the work of lowering and of passes.

    Attributes:
        counts: by the phase's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counts] = {}

    def run(self, name: str, share: float, work: Callable[[], T]) -> T:
        """Does ``work``, counted where Triton has no part in it."""
        if name not in ("lower", "passes"):
            return super().run(name, share, work)
        result, self.counts[name] = count_calls(work)
        return result
