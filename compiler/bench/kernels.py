"""``bench kernels``: each distinct kernel call of a step beside the roofline and its rivals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...codegen.triton.hand_on import own_results
from ...errors import UnsupportedError, UsageError
from ...runtime.engine import CausalLMEngine
from ..regress.timing.kernels import WRONG
from .kernel_clock import OURS, Clock, CudaClock
from .kernel_rivals import KernelRival, Prepare, Unavailable, make_rival, prepare_ours
from .latency import Advance
from .machine import Machine, probe_machine
from .statistics import Ratio, paired_ratio
from .step_calls import PHASES, Phase, StepCall, record_calls, step_setting
from .throughput import check_batches

ROUNDS = 15
WRITES = 0.25  # of the bytes: from there on the rate of a copy is the most that there is


@dataclass(frozen=True, slots=True)
class KernelTime:
    """A rival's time for a call.

    Attributes:
        name, label: for options and for reading.
        is_whole: whether it computes all that the call does.
        seconds: median; None where it could not be timed.
        ratio: its seconds over ours: above 1 where ours is faster.
        error: why it could not be timed.
    """

    name: str
    label: str
    is_whole: bool = True
    seconds: float | None = None
    ratio: Ratio | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One distinct call of a step.

    Attributes:
        name, kind, ops: of the kernel.
        count: how many such calls the step makes.
        seconds: of one, median.
        flops, bytes: of one, as the ops' schemas count them.
        floor: seconds that the machine's own rates allow.
        rivals: what else computes it.
        error: largest difference from a rival's results, over their largest magnitude; None where
            no rival computes the whole of it.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    count: int
    seconds: float
    flops: int
    bytes: int
    floor: float
    rivals: tuple[KernelTime, ...] = ()
    error: float | None = None

    @property
    def bytes_per_second(self) -> float:
        """What it reads and writes in a second."""
        return self.bytes / self.seconds

    @property
    def flops_per_second(self) -> float:
        """What it computes in a second."""
        return self.flops / self.seconds

    @property
    def share_of_floor(self) -> float:
        """How much of its time the floor is."""
        return self.floor / self.seconds

    @property
    def best(self) -> KernelTime | None:
        """The fastest of the rivals that could be timed."""
        timed = [rival for rival in self.rivals if rival.seconds is not None]
        return min(timed, key=lambda rival: rival.seconds or 0.0, default=None)

    @property
    def is_wrong(self) -> bool:
        """Whether its results are others than a rival's: then it has no speed."""
        return self.error is not None and self.error > WRONG


@dataclass(frozen=True, slots=True)
class KernelStep:
    """The calls of one step.

    Attributes:
        batch: sequences.
        rows: the one with the most time first.
    """

    batch: int
    rows: tuple[KernelRow, ...]

    @property
    def calls(self) -> int:
        """Of all rows."""
        return sum(row.count for row in self.rows)

    @property
    def seconds(self) -> float:
        """Of all calls, one after the other."""
        return sum(row.count * row.seconds for row in self.rows)

    @property
    def floor(self) -> float:
        """Of all calls."""
        return sum(row.count * row.floor for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all calls."""
        return sum(row.count * row.bytes for row in self.rows)


@dataclass(frozen=True, slots=True)
class KernelBench:
    """What ``bench kernels`` found.

    Attributes:
        machine: load and rates.
        phase, context, rounds: what was run.
        steps: by batch size.
    """

    machine: Machine
    phase: Phase
    context: int
    rounds: int
    steps: tuple[KernelStep, ...] = field(default_factory=tuple)


def measure_kernels(
    engine: CausalLMEngine,
    *,
    phase: Phase = "decode",
    batches: Sequence[int] = (1,),
    context: int = 512,
    compare: Sequence[str] = (),
    only: Sequence[str] = (),
    rounds: int = ROUNDS,
    clock: Clock | None = None,
    machine: Machine | None = None,
    advance: Advance = lambda phase, share: None,
) -> KernelBench:
    """Times each distinct kernel call of a step, by replays of CUDA graphs on cold operands, in
    turns with what else computes it.

    Args:
        engine: on a CUDA device.
        phase: of one token a sequence, or of whole prompts.
        batches: sequences of a step.
        context: length of each sequence when the step is done.
        compare: names of rivals (``kernel_rivals.NAMES``).
        only: names of kernels or ops to time, all if empty.
        rounds: figures of each side.
        clock, machine: of the device; by default made here.
        advance: told what runs, and the share that is done.

    Raises:
        UnsupportedError: the engine runs on no CUDA device.
        UsageError: sizes that do not fit the engine, or a name that no call has.
    """
    _check(engine, phase, batches, context)
    device = engine.runner.device
    if clock is None:
        clock = _clock(device)
    advance("measuring the machine", 0.0)
    machine = machine or probe_machine(str(engine.target), device)
    steps = []
    for index, batch in enumerate(batches):
        calls = record_calls(engine, phase, step_setting(phase, batch, context), only)
        rows = []
        for which, call in enumerate(calls):
            share = (index + which / len(calls)) / len(batches)
            advance(f"batch {batch}: {call.name}", 0.05 + 0.95 * share)
            rows.append(_row(call, compare, rounds, clock, machine))
        rows.sort(key=lambda row: -row.count * row.seconds)
        steps.append(KernelStep(batch, tuple(rows)))
    return KernelBench(machine, phase, context, rounds, tuple(steps))


def _row(
    call: StepCall, compare: Sequence[str], rounds: int, clock: Clock, machine: Machine
) -> KernelRow:
    with torch.no_grad(), call_device(call):
        rivals, failed = _rivals(call, compare)
        error = _error(call, rivals)
    sides: dict[str, Prepare] = {OURS: prepare_ours(call.problem)}
    sides |= {name: rival.prepare for name, rival in rivals.items()}
    contest = clock.enter(call.problem, sides)
    failed |= {name: said for name, said in contest.failed.items()}
    found = [contest.round() for _ in range(rounds)]
    ours = [seconds[OURS] for seconds in found]
    times = tuple(_time(name, rivals.get(name), failed.get(name), ours, found) for name in compare)
    return KernelRow(
        call.name,
        call.problem.call.kind,
        call.ops,
        call.problem.count,
        statistics.median(ours),
        call.flops,
        call.bytes,
        floor_seconds(call, machine),
        times,
        error,
    )


def _rivals(
    call: StepCall, compare: Sequence[str]
) -> tuple[dict[str, KernelRival], dict[str, str]]:
    """Those that there are, and why there are no others."""
    found: dict[str, KernelRival] = {}
    failed: dict[str, str] = {}
    for name in compare:
        try:
            found[name] = make_rival(name, call)
        except Unavailable as error:
            failed[name] = str(error)
    return found, failed


def _time(
    name: str,
    rival: KernelRival | None,
    failed: str | None,
    ours: Sequence[float],
    found: Sequence[Mapping[str, float]],
) -> KernelTime:
    label, whole = (name, True) if rival is None else (rival.label, rival.is_whole)
    if failed is not None:
        return KernelTime(name, label, whole, error=failed)
    theirs = [seconds[name] for seconds in found]
    return KernelTime(name, label, whole, statistics.median(theirs), paired_ratio(theirs, ours))


def call_device(call: StepCall) -> torch.device:
    """Where a call's operands are; as a context, where tensors are made."""
    return next(x.device for x in call.problem.operands if x is not None)


def floor_seconds(call: StepCall, machine: Machine) -> float:
    """The least time that the machine's measured rates allow one call."""
    rate = machine.read_bytes_per_second
    if call.written > WRITES * call.bytes and machine.copy_bytes_per_second is not None:
        rate = machine.copy_bytes_per_second
    computing = call.flops / (machine.matmul_flops_per_second or float("inf"))
    return max(call.bytes / rate, computing)


def _error(call: StepCall, rivals: Mapping[str, KernelRival]) -> float | None:
    """Of the results on copies of the operands, for either may write in place."""
    judge = next((r for name, r in rivals.items() if r.is_whole and name != "torch.compile"), None)
    if judge is None:
        return None
    sides = (prepare_ours(call.problem), judge.prepare)
    copies = [tuple(None if x is None else x.clone() for x in call.problem.operands) for _ in sides]
    try:
        ours, theirs = (
            _tensors(prepare(own)()) for prepare, own in zip(sides, copies, strict=True)
        )
    except Exception:  # whoever cannot run says so when he is timed
        return None
    own = own_results(call.problem.call, ours)
    return max((_apart(a, b) for a, b in zip(own, theirs, strict=True)), default=None)


def _tensors(found: object) -> list[torch.Tensor]:
    given = [found] if isinstance(found, torch.Tensor) else [*found]  # type: ignore[misc]
    return [x for x in given if x.is_floating_point()]  # a token more or less is no distance


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.numel() != theirs.numel():
        return float("inf")
    a, b = ours.float().flatten(), theirs.float().reshape(ours.shape).flatten()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _clock(device: torch.device) -> Clock:
    if device.type != "cuda":
        raise UnsupportedError(
            "bench kernels",
            expected="an engine on a CUDA device, whose kernels are timed there",
            found=f"one on {device}",
            remedy="Run it where the GPU is; tilewright inspect shows kernels and their rooflines.",
        )
    return CudaClock(device)


def _check(engine: CausalLMEngine, phase: str, batches: Sequence[int], context: int) -> None:
    if phase not in PHASES:
        raise UsageError(
            "option --phase",
            expected=f"one of {', '.join(PHASES)}",
            found=repr(phase),
            remedy="Choose one of those.",
        )
    check_batches(engine, batches)
    limit = engine.config.max_model_len
    if not 1 <= context <= limit:
        raise UsageError(
            "option --context",
            expected=f"1 to {limit} tokens, the engine's context",
            found=str(context),
            remedy="Change it, or compile with a larger --max-model-len.",
        )
