"""How long a kernel should take before anyone has run it: a roofline that knows of waves, of
programs that share a multiprocessor, and of how many bytes are on their way at once.

It ranks configs; it does not time them. Each template has constants of its own, fitted to measured
spaces of an H100 (benchmarks/fit_prior.py); for other devices only the rates of the target's row
change.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..targets import Target


@dataclass(frozen=True, slots=True)
class Work:
    """What one config of a kernel does, counted.

    Attributes:
        dram_bytes: read from and written to memory, each byte once.
        l2_bytes: moved between the L2 and the multiprocessors, by all programs together.
        flops: operations, padding included.
        dtype: torch's name of the dtype that is multiplied in.
        programs: of the launch that does the work.
        blocks_per_sm: programs that one multiprocessor holds at once, at least 1.
        bytes_in_flight: that one program has on its way at once.
        steps: of a program's loop, one after the other.
        stages: of those steps that overlap.
        splits: programs that share a result, whose parts are added up in the end.
        warps: of a program.
        accumulators: float32 sums that a thread holds.
    """

    dram_bytes: float
    l2_bytes: float
    flops: float
    dtype: str
    programs: int
    blocks_per_sm: int
    bytes_in_flight: float
    steps: int = 1
    stages: int = 1
    splits: int = 1
    warps: int = 4
    accumulators: float = 0.0


@dataclass(frozen=True, slots=True)
class Constants:
    """What the model cannot count.

    Attributes:
        latency: seconds from a request to its bytes under load; by Little's law, rate times
            latency is what has to be on its way.
        dram: share of the peak rate of memory that is reached.
        l2: rate of the L2 over the peak rate of memory.
        sm: bytes a second that one multiprocessor takes in.
        tensor: share of the peak rate of the tensor cores.
        tail: how much of a last wave's empty slots is lost; memory is shared, so not all of it.
        program: seconds of a program's start and end; ``overlap``: how many of them hide in others
            of the same multiprocessor, at most.
        parts, part: seconds of adding parts up: once, and for each.
        step: seconds of a step that waits, over the stages before it.
        accumulator: share by which 64 further sums a thread slow it down.
        many_warps, few_warps: what 8 warps or more, 2 or fewer, cost.
    """

    latency: float = 2.54e-6
    dram: float = 0.92
    l2: float = 2.34
    sm: float = 85.3e9
    tensor: float = 0.97
    tail: float = 0.281
    program: float = 1.17e-6
    overlap: float = 1.32
    parts: float = 1.0e-6
    part: float = 1.9e-6
    step: float = 0.252e-6
    accumulator: float = 0.0248
    many_warps: float = 0.26
    few_warps: float = 0.0737


def predict(work: Work, target: Target, constants: Constants) -> float:
    """Seconds of a call with cold caches.

    The slowest of memory, L2, multiprocessors and tensor cores decides; what fills no wave, starts
    and ends of programs, parts that are added up and loops short of stages come on top.
    """
    c = constants
    slots = target.sms * work.blocks_per_sm
    busy = min(work.programs, target.sms)
    peak = target.dram_gb_per_s * 1e9
    memory = peak * c.dram
    on_their_way = min(work.programs, slots) * work.bytes_in_flight
    seconds = max(
        work.dram_bytes / (memory * min(1.0, on_their_way / (memory * c.latency))),
        work.l2_bytes / (c.l2 * memory),
        work.l2_bytes / (c.sm * busy),
        work.flops / (target.flops_per_second(work.dtype) * c.tensor * busy / target.sms),
    )
    waves = -(-work.programs // slots)
    idle = waves * slots / work.programs - 1 if waves > 1 else 0.0
    each = -(-work.programs // target.sms)
    seconds *= 1 + c.tail * idle
    seconds += c.program * each / min(work.blocks_per_sm, c.overlap)
    if work.splits > 1:
        seconds += c.parts + c.part * work.splits
    seconds = max(seconds, waves * work.steps / max(work.stages - 1, 1) * c.step)
    warps = c.many_warps if work.warps >= 8 else c.few_warps if work.warps <= 2 else 0.0
    return seconds * (1 + warps + c.accumulator * max(0.0, work.accumulators / 64 - 1))
