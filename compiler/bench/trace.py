"""What the device does during a decode step, from torch's profiler: kernels, and the gaps between.

The profiler lists every kernel, those within the replay of a CUDA graph too. Its own cost falls
between kernels, so idle time is an upper bound; busy time is not touched by it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...runtime.engine import CausalLMEngine
from ...runtime.executor import CACHE_PREFIXES
from ...runtime.params import SamplingParams
from ..inspect.facts import Setting, bindings, call_costs, final_graph, op_label
from ..inspect.kernels import calls_by_function
from .decoding import decode_image, decode_program

MARK = (
    "spin_kernel"  # the kernel of torch.cuda._sleep, launched behind each step to tell them apart
)
MARK_CYCLES = 100
MEMORY = ("Memcpy", "Memset")


@dataclass(frozen=True, slots=True)
class Event:
    """One kernel or memory operation on the device; start and seconds on one clock."""

    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """When it ended."""
        return self.start + self.seconds

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel: not a copy or a fill by the driver."""
        return not self.name.startswith(MEMORY)


@dataclass(frozen=True, slots=True)
class Kernel:
    """All launches of the kernels of one name.

    Attributes:
        name: as the profiler gives it.
        launches, seconds: in one step, mean.
        bytes: that one launch moves at least, mean, where the graph tells; None where it does not.
    """

    name: str
    launches: float
    seconds: float
    bytes: int | None

    @property
    def bytes_per_second(self) -> float | None:
        """The rate that it reaches."""
        return None if self.bytes is None else self.bytes * self.launches / self.seconds


@dataclass(frozen=True, slots=True)
class Trace:
    """Decode steps on the device; times in seconds, medians over the steps.

    Attributes:
        steps: how many were looked at.
        layers: of the model.
        launches: kernels in a step.
        memory_operations: copies and fills in a step.
        span: from the start of a step's first kernel to the end of its last.
        busy: of that, with a kernel or a memory operation running.
        idle: the rest of the span.
        between: from the end of a step's last kernel to the start of the next one's first; None
            for a single step.
        kernels: by name, the one with the most time first.
    """

    steps: int
    layers: int
    launches: float
    memory_operations: float
    span: float
    busy: float
    idle: float
    between: float | None
    kernels: tuple[Kernel, ...]

    @property
    def launches_per_layer(self) -> float:
        """Kernels of a step over layers, those outside of layers included."""
        return self.launches / max(self.layers, 1)


def trace_decode(engine: CausalLMEngine, prompt: list[int], steps: int) -> Trace | str:
    """Profiles some decode steps of an engine on a GPU, or says why there is nothing to show.

    Args:
        engine: warm: its graphs are captured.
        prompt: token ids.
        steps: decode steps after it.
    """
    try:
        events = record_events(engine, prompt, steps)
    except Exception as error:  # a measurement beside the point must not cost those made before
        return f"the profiler failed: {' '.join(str(error).split())[:200]}"
    inputs = decode_program(engine).inputs
    layers = sum(name.startswith(CACHE_PREFIXES[0]) for name in inputs)
    found = summarize(events, layers, known_bytes(engine, len(prompt) + steps // 2))
    return found or (
        f"the profiler listed {len(events)} events on the device, and no decode step among them"
    )


def record_events(engine: CausalLMEngine, prompt: list[int], steps: int) -> list[Event]:
    """What ran on the device for a prompt and ``steps`` tokens after the first, with a MARK behind
    each step.
    """
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    # Tearing CUPTI down and starting it again breaks captured graphs.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    params = SamplingParams(max_new_tokens=steps + 1, ignore_eos=True)
    engine.reset_prefix_cache()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in engine.stream(prompt, params):
            torch.cuda._sleep(MARK_CYCLES)
        torch.cuda.synchronize()
    return [
        Event(event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    ]


def summarize(
    events: Sequence[Event], layers: int, known: Mapping[str, tuple[int, int]] | None = None
) -> Trace | None:
    """Figures of the decode steps among events: those between two MARKs.

    Args:
        events: in any order; what comes before the first MARK is the prompt's.
        layers: of the model.
        known: (calls in a step, bytes of each) by label, as ``known_bytes`` gives it.

    Returns:
        None where no step has a kernel.
    """
    steps = _usual([step for step in _split(events) if any(event.is_kernel for event in step)])
    if not steps:
        return None
    kernels = [[event for event in step if event.is_kernel] for step in steps]
    spans = [(step[0].start, max(event.end for event in step)) for step in kernels]
    busy = [covered(step, *span) for step, span in zip(steps, spans, strict=True)]
    lengths = [end - start for start, end in spans]
    gaps = [after[0] - before[1] for before, after in pairwise(spans)]
    return Trace(
        len(steps),
        layers,
        statistics.median(map(len, kernels)),
        statistics.median(len(a) - len(b) for a, b in zip(steps, kernels, strict=True)),
        statistics.median(lengths),
        statistics.median(busy),
        statistics.median(a - b for a, b in zip(lengths, busy, strict=True)),
        statistics.median(gaps) if gaps else None,
        _by_name([event for step in kernels for event in step], len(steps), known or {}),
    )


def known_bytes(engine: CausalLMEngine, context: int) -> dict[str, tuple[int, int]]:
    """(launches in a decode step, bytes of each, mean) by the functions of our kernels; for others
    by what the graph's nodes do, ``add_rms_norm``, where all of a label move as many bytes.
    """
    image = decode_image(engine)
    graph = final_graph(image)
    sizes = bindings(graph, image, Setting("decode", 1, context))
    moved: dict[str, list[int]] = {}
    for cost in call_costs(graph, engine.target, sizes):
        if cost.bytes:
            moved.setdefault(op_label(cost.node).removeprefix("fused "), []).append(cost.bytes)
    known = {label: (len(each), each[0]) for label, each in moved.items() if len({*each}) == 1}
    ours = calls_by_function(image, sizes)
    return known | {name: (len(each), sum(each) // len(each)) for name, each in ours.items()}


def _split(events: Sequence[Event]) -> list[list[Event]]:
    """Events in order of time, cut at the MARKs; without what is before the first and behind the
    last one.
    """
    pieces: list[list[Event]] = [[]]
    for event in sorted(events, key=lambda event: event.start):
        if MARK in event.name:
            pieces.append([])
        else:
            pieces[-1].append(event)
    return pieces[1:-1]


def _usual(steps: Sequence[list[Event]]) -> list[list[Event]]:
    """The steps with as many kernels as most have. Steps are launched one ahead of the host, so
    that two stand before the second MARK.
    """
    counts = [sum(event.is_kernel for event in step) for step in steps]
    usual = statistics.mode(counts) if counts else 0
    return [step for step, count in zip(steps, counts, strict=True) if count == usual]


def covered(events: Sequence[Event], start: float, end: float) -> float:
    """Seconds from start to end in which at least one event runs; events in order."""
    total, reached = 0.0, start
    for event in events:
        stop = min(event.end, end)
        if stop > reached:
            total += stop - max(event.start, reached)
            reached = stop
    return total


def _by_name(
    events: Sequence[Event], steps: int, known: Mapping[str, tuple[int, int]]
) -> tuple[Kernel, ...]:
    names: dict[str, list[float]] = {}
    for event in events:
        names.setdefault(event.name, []).append(event.seconds)
    found = [
        Kernel(
            name, len(times) / steps, sum(times) / steps, _bytes_of(name, len(times), steps, known)
        )
        for name, times in names.items()
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel.seconds))


def _bytes_of(
    name: str, launches: int, steps: int, known: Mapping[str, tuple[int, int]]
) -> int | None:
    """Bytes of one launch: by its own name, else by the longest label in it, if that has as many
    calls as there are launches.
    """
    labels = sorted((label for label in known if label in name), key=len)
    label = name if name in known else labels[-1] if labels else None
    if label is None or known[label][0] * steps != launches:
        return None
    return known[label][1]
