"""A call's launches over tensors: which variant, how large the grids, where results go.

What is common to running a kernel on a device (launch.py) and in the interpreter (interpreted.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from ...errors import CapacityError
from ...ir.dims import evaluate
from ...ir.types import TensorType
from ..by_sizes import BySizes
from .source import Argument, Described, KernelSource, Launch, Pointer
from .tensor_map import Mapped

Given = torch.Tensor | Mapped | int | None
"""What a launch is given for an argument."""

Places = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, shape and strides of a `Described`."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A call at given sizes.

    Attributes:
        results: shape of each result.
        workspaces: (dtype, elements) of each workspace.
        counters: how many there are.
        launches: with their grids, and by position the value of each Scalar, and where in its
            buffer each Described lies; those without programs are left out.
    """

    results: tuple[tuple[int, ...], ...]
    workspaces: tuple[tuple[torch.dtype, int], ...]
    counters: int
    launches: tuple[tuple[Launch, tuple[int, int, int], tuple[Places | int | None, ...]], ...]


class Plans(BySizes[Planned]):
    """A source's plans. Layers share their kernels, and so what one of them has worked out.

    Attributes:
        source: the source, whose launches the plans hold.
    """

    _shared: WeakValueDictionary[tuple[object, ...], Plans] = WeakValueDictionary()

    def __init__(self, source: KernelSource, results: Sequence[TensorType]) -> None:
        super().__init__(lambda sizes: plan_call(source, results, sizes))
        self.source = source

    @classmethod
    def of(cls, source: KernelSource, results: tuple[TensorType, ...]) -> Plans:
        """The plans of every call of an equal source with results of these types."""
        key = (source.name, source.digest, results)
        # Two threads may each make theirs, which only takes longer.
        found = cls._shared.get(key)
        if found is None:
            found = cls._shared[key] = cls(source, results)
        return found


class Invocation(ABC):
    """A loaded kernel: tensors in, tensors out (the ``Kernel`` of codegen/base.py).

    Args:
        source: variants and their arguments.
        results: type of each result.
        aliases: (result, operand) pairs written in place.
        device: where the operands are.
    """

    def __init__(
        self,
        source: KernelSource,
        results: Sequence[TensorType],
        aliases: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self.result_types, self.device = tuple(results), device
        self._plans = Plans.of(source, self.result_types)
        self.source = self._plans.source
        self.aliases = dict(aliases)
        self._dtypes = [type_.dtype.torch for type_ in self.result_types]
        self._counters: list[torch.Tensor] = []  # the last is the largest; graphs hold the others

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        plan = self._plan(sizes)
        results = [self._result(i, shape, operands) for i, shape in enumerate(plan.results)]
        spaces = [torch.empty(n, dtype=dtype, device=self.device) for dtype, n in plan.workspaces]
        memory: _Memory = {"operand": operands, "result": results, "workspace": spaces}
        if plan.counters:
            memory["counter"] = [self._zeros(plan.counters)]
        for launch, grid, values in plan.launches:
            arguments: list[Any] = [
                _mapped(argument, value, memory)
                if value.__class__ is tuple  # no call, which the host's part counts
                else memory[argument.role][argument.index]
                if isinstance(argument, Pointer)
                else value
                for argument, value in zip(launch.arguments, values, strict=True)
            ]
            self.launch(launch, grid, arguments)
        return results

    @abstractmethod
    def launch(
        self,
        launch: Launch,
        grid: tuple[int, int, int],
        arguments: Sequence[Given],
    ) -> None:
        """Runs one launch; pointers are given as the tensors that they point to."""

    def _result(
        self, index: int, shape: tuple[int, ...], operands: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        if index in self.aliases:
            operand = operands[self.aliases[index]]
            assert operand is not None
            return operand
        return torch.empty(shape, dtype=self._dtypes[index], device=self.device)

    def _zeros(self, count: int) -> torch.Tensor:
        """Counters, 0 between calls: made once, and larger ones when they are asked for."""
        if not self._counters or self._counters[-1].numel() < count:
            zeros = torch.zeros(count, dtype=torch.int32, device=self.device)
            self._counters.append(zeros)
        return self._counters[-1]

    def _plan(self, sizes: Mapping[str, int]) -> Planned:
        """The plan for these sizes."""
        return self._plans.at(sizes)


_Memory = dict[str, Sequence[torch.Tensor | None]]


def _mapped(argument: Argument, places: Any, memory: _Memory) -> Mapped:
    assert isinstance(argument, Described)
    tensor = memory[argument.role][argument.index]
    assert tensor is not None
    offset, shape, strides = places
    return Mapped(tensor, offset, shape, strides, argument.box, argument.swizzle)


def _places(argument: Argument, sizes: Mapping[str, int]) -> Places:
    assert isinstance(argument, Described)
    shape, strides = (
        tuple(evaluate(size, sizes) for size in found)
        for found in (argument.shape, argument.strides)
    )
    return evaluate(argument.offset, sizes), shape, strides


def _value(argument: Argument, sizes: Mapping[str, int]) -> Places | int | None:
    """A Scalar's value; None for a pointer, whose tensor comes with the call, and of a Described
    where in that it lies.
    """
    if isinstance(argument, Pointer):
        # No call, see above: steps of a new size ask this of every argument.
        return _places(argument, sizes) if argument.__class__ is Described else None
    value = evaluate(argument.value, sizes)
    if argument.type == "i32" and not -(1 << 31) <= value < 1 << 31:
        raise CapacityError(
            f"size {argument.value}",
            expected="less than 2^31, which the kernel was compiled for",
            found=str(value),
            remedy="Split the input.",
        )
    return value


def plan_call(
    source: KernelSource, results: Sequence[TensorType], sizes: Mapping[str, int]
) -> Planned:
    """A source's first variant whose guard holds, with every size evaluated."""
    variant = next(
        v for v in source.variants if all(evaluate(size, sizes) >= 0 for size in v.guard)
    )
    launches = []
    for launch in variant.launches:
        x, y, z = (evaluate(size, sizes) for size in launch.grid)
        values = tuple(_value(argument, sizes) for argument in launch.arguments)
        if x > 0 and y > 0 and z > 0:
            launches.append((launch, (x, y, z), values))
    return Planned(
        tuple(tuple(evaluate(size, sizes) for size in type_.shape) for type_ in results),
        tuple((dtype.torch, evaluate(count, sizes)) for dtype, count in variant.workspaces),
        evaluate(variant.counters, sizes),
        tuple(launches),
    )
