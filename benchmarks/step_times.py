"""What each step of a loop takes of the host, by kind of step, and all of it by name."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from host_parts import Parts

from tilewright.runtime import GenerationLoop
from tilewright.runtime.in_flight import InFlight

SAME, CHANGED, PROMPTS, DRAINED = "same rows", "rows change", "prompts", "drained"
_SLOWEST = 4  # steps that are told one by one
_NAMED = 0.03  # of a slow step: parts from here on are told


@dataclass(slots=True)
class _Step:
    """One step; times in microseconds.

    Attributes:
        kind: "same rows" decode, as in the step launched; "rows change", as some have joined or
            ended; "prompts" beside them in the step committed or in the one launched; "drained", so
            that nothing was launched ahead.
        host: on the clock, beside waiting for the device.
        cpu: of the thread: less than host and waited where the core was taken away, or slept.
        gc: within host, in Python's garbage collector.
        faults, switches: pages touched for the first time; how often the core was taken away.
        parts: of host, where it is timed within; they add up to it.
    """

    kind: str
    host: float
    waited: float
    cpu: float
    gc: float
    faults: int
    switches: int
    parts: dict[str, float] = field(default_factory=dict)


class StepTimes:
    """Looks at a loop's steps, as a context: at those that commit a step of many sequences.

    Args:
        loop: that runs.
        least: sequences of a step that counts.
        parts: timers of what a step consists of; None for none, which cost something themselves.
    """

    def __init__(self, loop: GenerationLoop, least: int = 100, parts: Parts | None = None) -> None:
        self._loop, self._least, self._parts = loop, least, parts
        self._waited = self._collected = self._began = 0.0
        self.steps: list[_Step] = []

    def __enter__(self) -> StepTimes:
        self._step, self._wait = self._loop.step, torch.cuda.Event.synchronize
        torch.cuda.Event.synchronize = self._waiting()  # type: ignore[method-assign]
        self._loop.step = self._timed  # type: ignore[method-assign]
        gc.callbacks.append(self._collects)
        return self

    def __exit__(self, *unused: object) -> None:
        gc.callbacks.remove(self._collects)
        torch.cuda.Event.synchronize = self._wait  # type: ignore[method-assign]
        del self._loop.step  # type: ignore[attr-defined]

    def _waiting(self) -> Any:
        wait = self._wait

        def synchronize(event: torch.cuda.Event) -> None:
            start = time.perf_counter()
            wait(event)
            taken = time.perf_counter() - start
            self._waited += taken
            if self._parts is not None:
                self._parts.note("waiting", taken)

        return synchronize

    def _collects(self, phase: str, unused: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._began

    def _timed(self) -> None:
        before, parts = self._loop._flight, self._parts
        self._waited = self._collected = 0.0
        if parts is not None:
            parts.begin()
        used, cpu = resource.getrusage(resource.RUSAGE_THREAD), time.thread_time()
        start = time.perf_counter()
        self._step()
        taken = time.perf_counter() - start
        cpu, after = time.thread_time() - cpu, resource.getrusage(resource.RUSAGE_THREAD)
        if before is None or before.plan.num_sequences < self._least:
            return
        found = {} if parts is None else {n: s * 1e6 for n, s in parts.begin().items()}
        found.pop("waiting", None)
        host = (taken - self._waited) * 1e6
        if parts is not None:
            found["rest"] = host - sum(found.values())
        faults = after.ru_minflt - used.ru_minflt
        switches = after.ru_nivcsw - used.ru_nivcsw
        kind, waited, collected = self._kind(before), self._waited * 1e6, self._collected * 1e6
        step = _Step(kind, host, waited, cpu * 1e6, collected, faults, switches, found)
        self.steps.append(step)

    def _kind(self, before: InFlight) -> str:
        after = self._loop._flight
        if after is None:
            return DRAINED
        if before.plan.beside or after.plan.beside:
            return PROMPTS
        return SAME if before.plan.decodes is after.plan.decodes else CHANGED

    def figures(self) -> dict[str, Any]:
        """Microseconds: medians and 99th percentiles of all and of each kind, the slowest steps,
        and of parts the means over the middle fifth of the "same rows" and over the slowest
        hundredth of all, which add up. None of no step.
        """
        steps = self.steps
        if not steps:
            return {}
        host = [step.host for step in steps]
        found: dict[str, Any] = {
            "host_us": statistics.median(host),
            "host_p99_us": float(np.percentile(host, 99)),
            "waited_us": statistics.median(step.waited for step in steps),
            "kinds": {},
        }
        for kind in (SAME, CHANGED, PROMPTS, DRAINED):
            mine = [step for step in steps if step.kind == kind]
            if mine:
                found["kinds"][kind] = _of_kind(mine)
        slow = sorted(steps, key=lambda step: -step.host)
        found["slowest"] = [_told(step) for step in slow[:_SLOWEST]]
        same = sorted((step for step in steps if step.kind == SAME), key=lambda step: step.host)
        if self._parts is not None and same:
            middle = same[len(same) * 2 // 5 : len(same) * 3 // 5 + 1]
            found["typical"] = _means(middle)
            found["slowest hundredth"] = _means(slow[: max(1, len(slow) // 100)])
        return found


def _of_kind(steps: Sequence[_Step]) -> dict[str, float]:
    host = [step.host for step in steps]
    return {
        "steps": len(steps),
        "p50": statistics.median(host),
        "p90": float(np.percentile(host, 90)),
        "p99": float(np.percentile(host, 99)),
        "max": max(host),
        "waited": statistics.median(step.waited for step in steps),
        "cpu": statistics.median(step.cpu for step in steps),
        "gc, all": sum(step.gc for step in steps),
        "faults": statistics.median(step.faults for step in steps),
        "switches": sum(step.switches for step in steps),
    }


def _told(step: _Step) -> dict[str, Any]:
    told = {name: getattr(step, name) for name in _Step.__slots__ if name != "parts"}
    large = {name: part for name, part in step.parts.items() if part > _NAMED * step.host}
    return told | {"parts": dict(sorted(large.items(), key=lambda one: -one[1]))}


def _means(steps: Sequence[_Step]) -> dict[str, float]:
    names = dict.fromkeys(name for step in steps for name in step.parts)
    found = {name: statistics.mean(s.parts.get(name, 0.0) for s in steps) for name in names}
    return {"sum": sum(found.values())} | found


def table(figures: dict[str, Any]) -> str:
    """For reading: a line a kind, and one for what each kind of mean consists of."""
    lines = [
        f"{kind:>12}: " + "  ".join(f"{name} {value:.0f}" for name, value in one.items())
        for kind, one in figures.get("kinds", {}).items()
    ]
    for name in ("typical", "slowest hundredth"):
        if name in figures:
            cells = (f"{part} {value:.1f}" for part, value in figures[name].items())
            lines.append(f"{name}: " + ", ".join(cells))
    for one in figures.get("slowest", []):
        parts = ", ".join(f"{part} {value:.0f}" for part, value in one["parts"].items())
        rest = (f"{k} {v:.0f}" for k, v in one.items() if isinstance(v, int | float))
        lines.append(f"slow, {one['kind']}: " + ", ".join(rest) + (f"; {parts}" if parts else ""))
    return "\n".join(lines)
