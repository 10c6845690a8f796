"""Fused bodies for the tests of generated kernels: operands anywhere in poisoned memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tilewright.codegen.triton.generate import emit_fused
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.layout import Layout, dense
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import make
from tilewright.ir.dims import Size, evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import Target

H100 = Target.parse("h100")
GUARD = 64  # poisoned elements on either side of each buffer


def poison(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A tensor of what must never be read: NaN, or the largest integer."""
    if dtype is torch.bool:
        return torch.ones(*shape, dtype=dtype, device=device)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)
    if dtype.is_floating_point:
        return torch.full(tuple(shape), 0x7F, dtype=torch.uint8, device=device).view(dtype)
    return torch.full(tuple(shape), torch.iinfo(dtype).max, dtype=dtype, device=device)


def guarded(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A dense, poisoned buffer with poison on either side of it."""
    count = torch.Size(shape).numel()
    return poison((count + 2 * GUARD,), dtype, device)[GUARD : GUARD + count].view(tuple(shape))


class GuardedKernel(InterpretedKernel):
    """A kernel whose results stand between guards, which it must leave as they are."""

    def _result(
        self, index: int, shape: tuple[int, ...], operands: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        if index in self.aliases:
            return super()._result(index, shape, operands)
        return guarded(shape, self.result_types[index].dtype.torch)


def intact(buffer: torch.Tensor) -> bool:
    """Whether the guards on either side of a buffer that ``guarded`` made are untouched."""
    whole = buffer.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(whole)
    width = GUARD * buffer.element_size()
    clean = poison((GUARD,), buffer.dtype, buffer.device).view(torch.uint8)
    return bool((raw[:width] == clean).all() and (raw[-width:] == clean).all())


def run(
    source: KernelSource,
    node: Node,
    operands: Sequence[torch.Tensor | None],
    sizes: Mapping[str, int],
) -> tuple[torch.Tensor, ...]:
    """The results of a kernel in the interpreter; guards must stay intact."""
    kernel = GuardedKernel(source, node.types, schema(node.op).aliases, torch.device("cpu"))
    with torch.no_grad():
        results = tuple(kernel(operands, sizes))
    fresh = [r for i, r in enumerate(results) if i not in kernel.aliases]
    assert all(map(intact, fresh)), f"{source.name} writes outside of its results"
    return results


def placed(
    value: torch.Tensor,
    type_: TensorType,
    order: Sequence[int] = (),
    pads: tuple[int, int] = (0, 0),
    step: int = 1,
) -> tuple[torch.Tensor, Layout]:
    """A value somewhere in a poisoned buffer, and where.

    Args:
        value: what the operand holds.
        type_: its declared, perhaps symbolic type.
        order: its axes as the buffer has them, outermost first.
        pads: elements before and behind the last axis of the value in the buffer.
        step: distance of neighbours along the last axis.
    """
    rank = value.dim()
    if rank == 0:
        buffer = guarded((), value.dtype)
        buffer.copy_(value)
        return buffer, Layout(0, ())
    order = tuple(order) or tuple(range(rank))
    shape: list[Size] = list(type_.shape)
    shape[-1] = pads[0] + (shape[-1] - 1) * step + 1 + pads[1]  # type: ignore[operator]
    strides = dense([shape[axis] for axis in order]).strides
    by_axis = {axis: stride for axis, stride in zip(order, strides, strict=True)}
    offset = by_axis[rank - 1] * pads[0]
    found = tuple(by_axis[axis] for axis in range(rank - 1)) + (by_axis[rank - 1] * step,)
    real = list(value.shape)
    real[-1] = max(0, pads[0] + (real[-1] - 1) * step + 1 + pads[1])
    buffer = guarded([real[axis] for axis in order], value.dtype)
    back = [order.index(axis) for axis in range(rank)]
    view = buffer.permute(back)[..., pads[0] :: step][..., : value.shape[-1]]
    view.copy_(value)
    return buffer, Layout(offset, found)


def call_of(body: Graph) -> Node:
    """A ``fused`` node that calls a body with its own inputs."""
    return make("fused", *body.inputs, body=body, kind="any")


def emitted(body: Graph, layouts: Sequence[Layout] | None = None) -> KernelSource | None:
    """The kernel of a body, its operands dense where no layouts are given."""
    given = layouts or [dense(node.shape) for node in body.inputs]
    return emit_fused(call_of(body), tuple(given), H100)


def drawn(type_: TensorType, sizes: Mapping[str, int], high: int = 3) -> torch.Tensor:
    """A random value of a type; integers lie in [0, high)."""
    shape = tuple(evaluate(size, sizes) for size in type_.shape)
    if type_.dtype.is_float:
        return torch.randn(shape).to(type_.dtype.torch)
    high = 2 if type_.dtype is DType.BOOL else high
    return torch.randint(0, high, shape).to(type_.dtype.torch)
