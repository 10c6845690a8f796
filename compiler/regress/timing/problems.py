"""What to time: each distinct call of an engine's steps, with the operands that it really gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....codegen.base import Kernel
from ....codegen.program import Call, Program
from ....runtime.engine import CausalLMEngine
from ....runtime.executor import CACHE_PREFIXES
from ....runtime.step_buffer import StepBuffer, StepShape
from ...inspect.kernels import VIEWS, kernel_name
from ..snapshot import plain_name
from .package import Package
from .steps import StepSetting, make_step, pages_of

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
    """

    subject: str
    setting: str
    call: Call
    operands: Operands
    sizes: Mapping[str, int]
    kernel: Kernel


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


def record_problems(engine: CausalLMEngine, setting: StepSetting) -> list[Problem]:
    """Runs one step, and keeps the first call of each kernel on operands of its shapes.

    Calls that torch answers with a view are left out: they take no time on the device.
    """
    runner, lm = engine.runner, engine.image.lm
    assert lm is not None
    step, device = make_step(setting, lm), runner.device
    shape = StepShape.of(step)
    metadata = StepBuffer(shape.nbytes, device)
    metadata.fill(step, shape)
    inputs = metadata.views(shape) | _caches(engine, setting)
    before = runner.steps
    seen: list[tuple[Call, Kernel, Operands]] = []
    watches = [_Watch(call, kernel, seen) for call, kernel in before]
    runner.steps = [(watch.call, watch) for watch in watches]
    try:
        runner.run(inputs)
    finally:
        runner.steps = before
    return _distinct(seen, watches[0].sizes if watches else {}, setting)


def _caches(engine: CausalLMEngine, setting: StepSetting) -> dict[str, torch.Tensor]:
    """KV buffers for the step alone, filled with random numbers."""
    program, lm, device = engine.image.program, engine.image.lm, engine.runner.device
    assert lm is not None
    pages = 1 + setting.sequences * pages_of(setting, lm.page_size)
    known = {"N": pages, "P": lm.page_size}
    found = {}
    for name in program.inputs:
        if name.startswith(CACHE_PREFIXES):
            type_ = program.buffers[name]
            sizes = [known.get(str(s), s) for s in type_.shape]
            found[name] = torch.empty(
                [int(str(s)) for s in sizes], dtype=type_.dtype.torch, device=device
            ).normal_()
    return found


def _distinct(
    seen: Sequence[tuple[Call, Kernel, Operands]],
    sizes: Mapping[str, int],
    setting: StepSetting,
) -> list[Problem]:
    found: list[Problem] = []
    known: set[object] = set()
    names: Counter[str] = Counter()
    for call, kernel, operands in seen:
        key = (call.kernel, tuple(None if x is None else (x.shape, x.stride()) for x in operands))
        if key in known or call.kernel.split("/", 1)[1] in VIEWS:
            continue
        known.add(key)
        name = subject_of(call)
        names[name] += 1
        subject = name if names[name] == 1 else f"{name}#{names[name]}"
        found.append(Problem(subject, setting.name, call, operands, sizes, kernel))
    return found


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
        self.calls = _first_calls(image.program)

    def of(self, problem: Problem) -> Load | str:
        """What loads this engine's kernel for a problem, or why there is none."""
        call = self.counterpart(problem)
        if call is None:
            return "the old engine has no such kernel on operands of these types and sizes"
        device = next(x.device for x in problem.operands if x is not None)
        return lambda: self.load(call, device)

    def counterpart(self, problem: Problem) -> Call | None:
        """This engine's call of a problem's name and operands: of several that of the same text,
        else that of the same number, else the first.
        """
        name, _, number = problem.subject.partition("#")
        named = [call for call in self.calls if subject_of(call) == name]
        alike = [call for call in named if self._fits(call, problem)]
        wanted = named[min(int(number or 1), len(named)) - 1] if named else None

        def likeness(call: Call) -> tuple[bool, bool, bool]:
            own = problem.call
            return call.kernel == own.kernel, call.attrs == own.attrs, call is wanted

        return max(alike, key=likeness, default=None)

    def load(self, call: Call, device: torch.device) -> Kernel:
        """The kernel of a call, its code at an address of its own."""
        program, read = self.image.program, self.image.files.__getitem__
        if call.loader == "triton":
            self.package.module("codegen.triton.launch").LoadedFunction.forget()
        kernel: Kernel = self.get_backend(call.loader).load(call, program, {}, read, device)
        return kernel

    def _fits(self, call: Call, problem: Problem) -> bool:
        """Whether a call takes the problem's operands, and its loader nothing beside them."""
        if len(call.operands) != len(problem.operands) or call.constants or problem.call.constants:
            return False
        buffers = self.image.program.buffers
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
