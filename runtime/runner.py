"""Runs Programs: binds symbols from input shapes, calls kernels in order, frees what is dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..codegen.base import Kernel, ReadFile, get_backend
from ..codegen.program import Call, Program
from ..errors import UsageError
from ..ir.dims import Dim, evaluate
from ..ir.types import TensorType


class ProgramRunner:
    """A Program with its kernels loaded.

    Args:
        program: what to run.
        weights: every weight that the Program names, on the device it runs on.
        read: reads the engine's artifacts.

    Attributes:
        peak_bytes: most memory that values between calls took at once, over all runs so far.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, torch.Tensor], read: ReadFile
    ) -> None:
        self.program = program
        self.constants = {buffer: weights[name] for buffer, name in program.weights.items()}
        self.steps: list[tuple[Call, Kernel]] = []
        for call in program.calls:
            kernel = get_backend(call.loader).load(call, program, weights, read)
            if _is_constant(call):
                self.constants.update(zip(call.results, kernel((), {}), strict=True))
            else:
                self.steps.append((call, kernel))

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the Program.

        Args:
            inputs: one tensor an input, by name. State is written in place.

        Returns:
            The outputs by name.

        Raises:
            UsageError: an input that is missing, or whose shape or element type does not fit.
        """
        sizes = bind_sizes(self.program, inputs)
        values: dict[str, torch.Tensor] = {**self.constants, **inputs}
        with torch.inference_mode():
            for call, kernel in self.steps:
                operands = [None if name is None else values[name] for name in call.operands]
                values.update(zip(call.results, kernel(operands, sizes), strict=True))
                for name in call.frees:
                    values.pop(name, None)
        return {name: values[buffer] for name, buffer in self.program.outputs}


def bind_sizes(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The symbols' values from the inputs' shapes, checked against every input's type."""
    sizes: dict[str, int] = {}
    for name in program.inputs:
        if name not in inputs:
            raise _misfit(program, name, "no tensor")
        for size, actual in zip(program.buffers[name].shape, inputs[name].shape, strict=False):
            if isinstance(size, Dim) and str(size).isidentifier():
                sizes.setdefault(str(size), actual)
    for name in program.inputs:
        type_, tensor = program.buffers[name], inputs[name]
        if not _fits(type_, tensor, sizes):
            raise _misfit(program, name, f"{tensor.dtype} {list(tensor.shape)}", sizes)
    return sizes


def _fits(type_: TensorType, tensor: torch.Tensor, sizes: Mapping[str, int]) -> bool:
    if type_.dtype.torch is not tensor.dtype or type_.rank != tensor.dim():
        return False
    wanted: Sequence[int] = [evaluate(size, sizes) for size in type_.shape]
    return list(tensor.shape) == wanted


def _is_constant(call: Call) -> bool:
    """Whether a call gives the same value at every run: nothing read, no symbolic size."""
    symbolic = any(isinstance(value, Dim | tuple) for value in call.attrs.values())
    return not call.operands and not call.constants and not symbolic


def _misfit(
    program: Program, name: str, found: str, sizes: Mapping[str, int] | None = None
) -> UsageError:
    bound = f" with {dict(sizes)}" if sizes else ""
    return UsageError(
        f"input {name!r}",
        expected=f"{program.buffers[name]}{bound}",
        found=found,
        remedy="Give it that shape and element type, or compile with dynamic_shapes for this dimension.",
    )
