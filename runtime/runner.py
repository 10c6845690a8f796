"""Runs Programs: binds symbols from input shapes, calls kernels in order, frees what is dead."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from ..codegen.base import Keeps, Kernel, ReadFile, Recovers, get_backend
from ..codegen.program import FRESH, SHARED, Call, Program
from ..errors import KernelError, UsageError
from ..ir.dims import Dim, Size, evaluate, name_of, symbols_of
from ..ir.types import TensorType

_NOTHING = object()
ALIGNMENT = 16  # bytes: what a kernel may load at once


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The symbols' values, and which guards hold at them: those of the layers are equal."""

    values: dict[str, int]
    guards: dict[tuple[Size, ...], bool] = field(default_factory=dict)

    def makes(self, call: Call) -> bool:
        found = self.guards.get(call.guard)
        if found is None:
            found = self.guards[call.guard] = call.runs_at(self.values)
        return found


class ProgramRunner:
    """A Program with its kernels loaded.

    Args:
        program: what to run.
        weights: every weight that the Program names, on the device it runs on.
        read: reads the engine's artifacts.
        device: where the Program runs; inputs are brought there.
        inference: whether results are inference tensors: quicker, but a user can neither write to
            them nor use them under grad, so only for results that stay inside.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        read: ReadFile,
        *,
        device: torch.device | None = None,
        inference: bool = True,
    ) -> None:
        self.program = program
        self.device = device or torch.device("cpu")
        self.mode = torch.inference_mode if inference else torch.no_grad
        self.constants = {buffer: weights[name] for buffer, name in program.weights.items()}
        self._bound: tuple[list[object], _Sizes] = ([_NOTHING], _Sizes({}))
        self._takes_dense = any(call.loader == "triton" for call in program.calls)
        self.steps: list[tuple[Call, Kernel]] = []
        for call in program.calls:
            kernel = get_backend(call.loader).load(call, program, weights, read, self.device)
            if _is_constant(call):
                with self._scope():
                    self.constants.update(zip(call.results, kernel((), {}), strict=True))
            else:
                self.steps.append((call, kernel))

    def run(
        self, inputs: Mapping[str, torch.Tensor], fresh: bool = False, shared: bool = False
    ) -> dict[str, torch.Tensor]:
        """Runs the Program.

        Args:
            inputs: one tensor an input, by name. State is written in place.
            fresh: whether the inputs are a step of one sequence alone, all of whose keys are of
                tokens that it computes (``FRESH``).
            shared: whether the inputs tell of sequences that share pages (``SHARED``).

        Returns:
            The outputs by name.

        Raises:
            UsageError: an input that is missing, or whose shape or element type does not fit.
        """
        bound = self._sizes(inputs, fresh, shared)
        sizes = bound.values
        values: dict[str, torch.Tensor] = {**self.constants, **self._brought(inputs)}
        with self.mode(), self._scope():
            for call, kernel in self.steps:
                if not call.guard or bound.makes(call):
                    operands = [None if name is None else values[name] for name in call.operands]
                    values.update(zip(call.results, kernel(operands, sizes), strict=True))
                for name in call.frees:
                    values.pop(name, None)
        return {name: values[buffer] for name, buffer in self.program.outputs}

    def artifacts(self) -> dict[str, bytes]:
        """What its kernels would not have to find again at a later start, by path."""
        found: dict[str, bytes] = {}
        for _, kernel in self.steps:
            if isinstance(kernel, Keeps):
                found.update(kernel.artifacts())
        return found

    def recover(self) -> KernelError | None:
        """Makes kernels new of which a launch was given up; the error of the first, None if all are
        well. Waits for the device.
        """
        found = [kernel.recover() for _, kernel in self.steps if isinstance(kernel, Recovers)]
        return next((error for error in found if error is not None), None)

    def _scope(self) -> AbstractContextManager[object]:
        """Inside, the Program's device is the current one, which kernels launch on."""
        return nullcontext() if self.device.type == "cpu" else torch.cuda.device(self.device)

    def _brought(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if self.device.type == "cpu":
            if not self._takes_dense:
                return inputs
            return {name: tensor.contiguous() for name, tensor in inputs.items()}
        return {name: _aligned(tensor.to(self.device)) for name, tensor in inputs.items()}

    def _sizes(self, inputs: Mapping[str, torch.Tensor], fresh: bool, shared: bool) -> _Sizes:
        """``bind_sizes``, remembered for the last shapes: most decode steps have those of the one
        before.
        """
        given = [inputs.get(name) for name in self.program.inputs]
        shapes: list[object] = [None if t is None else (t.dtype, t.shape) for t in given]
        shapes += [fresh, shared]
        bound = self._bound  # read once: another thread may set it
        if shapes != bound[0]:
            sizes = bind_sizes(self.program, inputs)
            sizes |= {str(name): 1 for name, said in ((FRESH, fresh), (SHARED, shared)) if said}
            bound = self._bound = (shapes, _Sizes(sizes))
        return bound[1]


def bind_sizes(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The symbols' values from the inputs' shapes, checked against every input's type.

    Raises:
        UsageError: an input that is missing, or whose shape or element type does not fit; it names
            the dimension.
    """
    sizes: dict[str, int] = {}
    derived: list[tuple[Dim, int]] = []
    for name in program.inputs:
        if name not in inputs:
            raise _misfit(program, name, "no tensor", sizes)
        for size, actual in zip(program.buffers[name].shape, inputs[name].shape, strict=False):
            symbol = name_of(size)
            if symbol is not None:
                sizes.setdefault(symbol, actual)
            elif isinstance(size, Dim):
                derived.append((size, actual))
    for size, actual in derived:
        _solve(size, actual, sizes)
    for name in program.inputs:
        wrong = _difference(program.buffers[name], inputs[name], sizes)
        if wrong is not None:
            raise _misfit(program, name, wrong, sizes)
    return sizes


def _solve(size: Dim, actual: int, sizes: dict[str, int]) -> None:
    """Binds the one unknown symbol of a size such as ``2 * s + 1``; whether it fits is checked
    afterwards.
    """
    unknown = sorted(symbols_of(size) - set(sizes))
    if len(unknown) == 1:
        at_0, at_1 = (evaluate(size, {**sizes, unknown[0]: value}) for value in (0, 1))
        if at_1 != at_0:
            sizes[unknown[0]] = (actual - at_0) // (at_1 - at_0)


def _difference(type_: TensorType, tensor: torch.Tensor, sizes: Mapping[str, int]) -> str | None:
    """What of ``tensor`` is not of ``type_``, None if all is."""
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if type_.dtype.torch is not tensor.dtype:
        return f"another element type: {found}"
    if type_.rank != tensor.dim():
        return f"{tensor.dim()} dimensions: {found}"
    for dim, (size, actual) in enumerate(zip(type_.shape, tensor.shape, strict=True)):
        if size != actual and evaluate(size, sizes) != actual:
            return f"dimension {dim} of {actual}: {found}"
    return None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor dense and 16-byte aligned, as kernels take it: itself, or a copy."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % ALIGNMENT == 0 else dense.clone()


def _is_constant(call: Call) -> bool:
    """Whether a call gives the same value at every run: nothing read, no symbolic size."""
    symbolic = any(isinstance(value, Dim | tuple) for value in call.attrs.values())
    return not call.operands and not call.constants and not symbolic and not call.guard


def _misfit(program: Program, name: str, found: str, sizes: Mapping[str, int]) -> UsageError:
    type_ = program.buffers[name]
    used = {symbol: sizes[symbol] for symbol in sorted(type_.symbols) if symbol in sizes}
    bound = f" with {', '.join(f'{k} = {v}' for k, v in used.items())}" if used else ""
    return UsageError(
        f"input {name!r}",
        expected=f"{type_}{bound}",
        found=found,
        remedy="Give it that shape and dtype, or compile with dynamic_shapes for this dimension.",
    )
