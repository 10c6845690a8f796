"""Where a step's time goes: the host's by parts, the device's beside its forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tilewright.runtime.device_queue import Noted
from tilewright.runtime.engine import CausalLMEngine


class Parts:
    """Seconds of each part of a step, without what is inside it and has a name too.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._step: dict[str, float] = {}
        self._clock, self._inside = clock, [0.0]
        self._methods: list[tuple[object, str, object]] = []

    def timed(self, owner: object, name: str, part: str) -> None:
        """From now on calls of a method count as that part."""
        method = getattr(owner, name)

        def measured(*args: object, **knobs: object) -> object:
            self._inside.append(0.0)
            start = self._clock()
            try:
                return method(*args, **knobs)
            finally:
                taken = self._clock() - start
                own = taken - self._inside.pop()
                self.seconds.setdefault(part, []).append(own)
                self._step[part] = self._step.get(part, 0.0) + own
                self._inside[-1] += taken

        self._methods.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, measured)

    def note(self, part: str, seconds: float) -> None:
        """Seconds within what is being timed count as a part of their own."""
        self._step[part] = self._step.get(part, 0.0) + seconds
        self._inside[-1] += seconds

    def begin(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        found, self._step = self._step, {}
        return found

    def stop(self) -> None:
        """Methods are what they were."""
        for owner, name, method in reversed(self._methods):
            if method is None:
                delattr(owner, name)
            else:
                setattr(owner, name, method)


def queue_calls(engine: CausalLMEngine, times: int = 300) -> dict[str, float]:
    """Median microseconds of what a step asks of the driver: by the queue, and by torch."""
    graphs = engine.executor.graphs
    assert graphs is not None
    queue, turn = graphs.queue, graphs.metadata._turns[0]
    queue.join()
    event = torch.cuda.Event()
    event.record()
    metadata, memory, tokens = graphs.metadata.device, turn.memory, turn.come
    pair, whole = (metadata[:4096], memory[:4096]), (metadata, memory)
    noted = [Noted() for _ in range(3)]
    back = tokens, torch.zeros_like(tokens, device=metadata.device)
    calls: dict[str, Callable[[], object]] = {
        "join": queue.join,
        "copy": lambda: queue.copy(*pair),
        "copy, noted": lambda: queue.copy(*pair, noted[0]),
        "copy with tables, noted": lambda: queue.copy(*whole, noted[1]),
        "copy of tokens, noted": lambda: queue.copy(*back, noted[2]),
        "copy by torch": lambda: pair[0].copy_(pair[1], non_blocking=True),
        "record": lambda: queue.record(event),
        "record by torch": event.record,
        "wait for what has come": event.synchronize,
    }
    found = {}
    for name, call in calls.items():
        taken = []
        for _ in range(times):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e6)
        found[name] = statistics.median(taken)
    graphs.metadata._tables = -1  # they are another step's now
    found["direct"] = float(getattr(queue, "_driver", None) is not None)
    return found


class DeviceTimes:
    """Of decode steps: how long the device takes to the logits and tokens of one, and from there to
    those of a choice under masks; how often the host came too late with that, and what did not run
    as a decode step launched ahead.

    Args:
        engine: whose steps are looked at from now on.
    """

    def __init__(self, engine: CausalLMEngine) -> None:
        executor, self._loop = engine.executor, engine.loop
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self.late = self.mixed = self.drained = self.steps = 0
        graphs, step = executor.graphs, engine.loop.step
        assert graphs is not None
        launch, choose, launch_mixed = graphs.launch, graphs.choose, executor.launch_mixed

        def launched(*args: object) -> object:
            found = launch(*args)  # type: ignore[arg-type]
            self._mark("step")
            return found

        def chosen(*args: object) -> object:
            self.late += self._marks[-1][1].query()
            found = choose(*args)  # type: ignore[arg-type]
            self._mark("choice")
            return found

        def mixed(*args: object) -> object:
            self.mixed += 1
            found = launch_mixed(*args)  # type: ignore[arg-type]
            self._mark("mixed")
            return found

        def stepped() -> None:
            self.steps += 1
            self.drained += self._loop._flight is None
            step()

        graphs.launch, graphs.choose = launched, chosen  # type: ignore[method-assign]
        executor.launch_mixed, engine.loop.step = mixed, stepped  # type: ignore[method-assign]

    def _mark(self, what: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((what, event))

    def figures(self) -> dict[str, float]:
        """Median and mean microseconds of the device, and counts, since the last call."""
        torch.cuda.synchronize()
        taken: dict[str, list[float]] = {}
        for (_, before), (what, event) in zip(self._marks, self._marks[1:], strict=False):
            taken.setdefault(what, []).append(before.elapsed_time(event) * 1e3)
        found = {f"{what}, median": statistics.median(times) for what, times in taken.items()}
        found |= {f"{what}, mean": statistics.mean(times) for what, times in taken.items()}
        found |= {"late": self.late, "mixed": self.mixed, "drained": self.drained}
        found["steps"] = self.steps
        self.late = self.mixed = self.drained = self.steps = 0
        self._marks.clear()
        return found
