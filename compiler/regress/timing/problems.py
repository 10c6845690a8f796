"""What to time: each distinct call of an engine's steps, with the operands that it really gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ....codegen.base import Kernel
from ....codegen.program import Call, Program
from ....runtime.engine import CausalLMEngine
from ....runtime.executor import CACHE_PREFIXES
from ....runtime.image import LMConfig
from ....runtime.runner import ProgramRunner
from ....runtime.step_buffer import GROUPS, SAMPLING, StepBuffer, StepShape
from ...inspect.kernels import VIEWS, kernel_name
from ..snapshot import plain_name
from .package import Package
from .steps import DECODES, StepSetting, make_step, pages_of

Operands = tuple[torch.Tensor | None, ...]
Load = Callable[[], Kernel]
"""Loads a kernel anew."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One call to time.

    Attributes:
        subject: the kernel's name without hashes, numbered where several bear it.
        setting: of the step.
        call: of the new engine.
        operands: what it was given.
        sizes: values of the Program's symbols.
        kernel: loaded.
        count: how many such calls the step makes.
    """

    subject: str
    setting: str
    call: Call
    operands: Operands
    sizes: Mapping[str, int]
    kernel: Kernel
    count: int = 1

    @property
    def decodes(self) -> bool:
        """Whether it is of a decode step."""
        return self.setting.startswith(DECODES)


class _Watch:
    """Stands for a kernel during one run, and remembers what it was given."""

    def __init__(
        self, call: Call, kernel: Kernel, seen: list[tuple[Call, Kernel, Operands]]
    ) -> None:
        self.call, self.kernel, self.seen = call, kernel, seen
        self.sizes: Mapping[str, int] = {}

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        self.sizes = sizes
        self.seen.append((self.call, self.kernel, tuple(operands)))
        return self.kernel(operands, sizes)


def record_problems(
    engine: CausalLMEngine, setting: StepSetting, runner: ProgramRunner | None = None
) -> list[Problem]:
    """Runs one step, and keeps the first call of each kernel on operands of its shapes.

    Calls that torch answers with a view are left out: they take no time on the device.

    Args:
        engine: running.
        setting: of the step.
        runner: what runs it; by default that of the engine's general Program.
    """
    lm, runner = engine.image.lm, runner or engine.runner
    assert lm is not None
    step = make_step(setting, lm)
    metadata = StepBuffer(StepShape.of(step), runner.device)
    metadata.fill(step)
    given = metadata.views | _caches(runner, lm, setting) | _greedy(setting, runner.device)
    inputs = {name: given[name] for name in runner.program.inputs}
    before = runner.steps
    seen: list[tuple[Call, Kernel, Operands]] = []
    watches = [_Watch(call, kernel, seen) for call, kernel in before]
    runner.steps = [(watch.call, watch) for watch in watches]
    try:
        runner.run(inputs)
    finally:
        runner.steps = before
    return _distinct(seen, watches[0].sizes if watches else {}, setting)


def _caches(runner: ProgramRunner, lm: LMConfig, setting: StepSetting) -> dict[str, torch.Tensor]:
    """KV buffers for the step alone, filled with random numbers; layers of one type share them, for
    only the first layer's are kept.
    """
    program = runner.program
    pages = 1 + setting.sequences * pages_of(setting, lm.page_size)
    known = {"N": pages, "P": lm.page_size}
    shared: dict[tuple[str, str], torch.Tensor] = {}
    found = {}
    for name in program.inputs:
        if name.startswith(CACHE_PREFIXES):
            type_, kind = program.buffers[name], name.rstrip("0123456789")
            if (kind, str(type_)) not in shared:
                sizes = [int(str(known.get(str(s), s))) for s in type_.shape]
                numbers = torch.float32 if type_.dtype.bytes == 1 else type_.dtype.torch
                values = torch.empty(sizes, dtype=numbers, device=runner.device).normal_()
                shared[kind, str(type_)] = values.to(type_.dtype.torch)
            found[name] = shared[kind, str(type_)]
    return found


def _greedy(setting: StepSetting, device: torch.device) -> dict[str, torch.Tensor]:
    """What a step that samples is told beside: to take the likeliest tokens."""
    return {
        name: torch.full((setting.sequences,), int(name == "top_p"), dtype=dtype, device=device)
        for name, dtype in {**SAMPLING, **GROUPS}.items()
    }


def _distinct(
    seen: Sequence[tuple[Call, Kernel, Operands]],
    sizes: Mapping[str, int],
    setting: StepSetting,
) -> list[Problem]:
    first: dict[object, Problem] = {}
    counts: Counter[object] = Counter()
    names: Counter[str] = Counter()
    for call, kernel, operands in seen:
        key = (call.kernel, tuple(None if x is None else (x.shape, x.stride()) for x in operands))
        if call.kernel.split("/", 1)[1] in VIEWS:
            continue
        counts[key] += 1
        if key in first:
            continue
        name = subject_of(call)
        names[name] += 1
        subject = name if names[name] == 1 else f"{name}#{names[name]}"
        first[key] = Problem(subject, setting.name, call, operands, sizes, kernel)
    return [replace(problem, count=counts[key]) for key, problem in first.items()]


def subject_of(call: Call) -> str:
    """The kernel's name without the hashes that change with its text."""
    return plain_name(kernel_name(call).removeprefix("eager/"))


class Kernels:
    """The kernels of an engine, loaded by the code that compiled it.

    Args:
        image: the engine, not running.
        package: that code.
    """

    def __init__(self, image: Any, package: Package) -> None:
        self.image, self.package = image, package
        self.get_backend = package.module("codegen.base").get_backend
        decode = getattr(image, "decode", None)  # older code has no Program for such steps
        self.programs: list[Program] = [image.program]
        self.programs += [] if decode is None else [decode.program]
        self.calls = [_first_calls(program) for program in self.programs]

    def of(self, problem: Problem) -> Load | str:
        """What loads this engine's kernel for a problem, or why there is none."""
        call = self.counterpart(problem)
        if call is None:
            return "the old engine has no such kernel on operands of these types and sizes"
        device = next(x.device for x in problem.operands if x is not None)
        return lambda: self.load(call, device)

    def counterpart(self, problem: Problem) -> Call | None:
        """This engine's call of a problem's name and operands: of several that of the same text,
        else that of the same number, else the first. For a decode step it is one of the Program of
        such steps, or else one of the general Program, which runs them where there is no other.
        """
        programs = self.calls[::-1] if problem.decodes else self.calls[:1]
        found = (self._closest(calls, problem) for calls in programs)
        return next((call for call in found if call is not None), None)

    def _closest(self, there: Sequence[Call], problem: Problem) -> Call | None:
        name, _, number = problem.subject.partition("#")
        named = [call for call in there if subject_of(call) == name]
        alike = [call for call in named if self._fits(call, problem)]
        wanted = named[min(int(number or 1), len(named)) - 1] if named else None

        def likeness(call: Call) -> tuple[bool, bool, bool]:
            own = problem.call
            return call.kernel == own.kernel, call.attrs == own.attrs, call is wanted

        return max(alike, key=likeness, default=None)

    def load(self, call: Call, device: torch.device) -> Kernel:
        """The kernel of a call, its code at an address of its own."""
        program, read = self._program(call), self.image.files.__getitem__
        if call.loader == "triton":
            self.package.module("codegen.triton.launch").LoadedFunction.forget()
        kernel: Kernel = self.get_backend(call.loader).load(call, program, {}, read, device)
        return kernel

    def _program(self, call: Call) -> Program:
        """The Program that a call is of."""
        owners = (p for p in self.programs if any(own is call for own in p.calls))
        return next(owners, self.programs[0])

    def _fits(self, call: Call, problem: Problem) -> bool:
        """Whether a call takes the problem's operands, and its loader nothing beside them."""
        if len(call.operands) != len(problem.operands) or call.constants or problem.call.constants:
            return False
        buffers = self._program(call).buffers
        types = [None if name is None else buffers[name] for name in call.operands]
        return all(
            (t is None) == (x is None)
            and (x is None or t is None or (t.dtype.torch is x.dtype and _may_be(t.shape, x)))
            for t, x in zip(types, problem.operands, strict=True)
        )


def _may_be(shape: Sequence[object], tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape's sizes, where those are known before a run."""
    known = [int(str(size)) if str(size).isdigit() else None for size in shape]
    return len(known) == tensor.dim() and all(
        size in (None, actual) for size, actual in zip(known, tensor.shape, strict=True)
    )


def _first_calls(program: Program) -> list[Call]:
    """The first call of each kernel, and of each call of a library by what it reads."""
    found: dict[object, Call] = {}
    for call in program.calls:
        types = tuple(None if n is None else str(program.buffers[n]) for n in call.operands)
        found.setdefault((call.kernel, types), call)
    return list(found.values())
