"""What a lowering rule sees: one call with its arguments by name, and its declared result types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ...errors import GraphError
from ...ir.build import cast, const, make
from ...ir.dims import Dim, Size
from ...ir.dtypes import DType
from ...ir.node import Node
from ...ir.types import TensorType
from .symbols import Complex, Number, Sizes

Value: TypeAlias = (
    "Node | Dim | Number | Complex | int | float | bool | str | None | torch.dtype | torch.device"
    " | torch.layout | torch.memory_format | list[Value] | tuple[Value, ...]"
)
Result: TypeAlias = "Node | tuple[Node | None, ...] | None"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an ATen or `tilewright::` op.

    Accessors raise GraphError when an argument is not of the kind asked for; the call then runs as
    an ``aten`` node.

    Attributes:
        op: e.g. ``aten.add``.
        args: every argument of the op's schema by name, defaults included.
        results: the declared type of each result, None for results that are no tensors.
        contiguous: names of the tensor arguments that are row-major in the module.
        sizes: reads symbolic sizes.
    """

    op: str
    args: Mapping[str, Value]
    results: tuple[TensorType | None, ...]
    contiguous: frozenset[str]
    sizes: Sizes

    @property
    def type(self) -> TensorType:
        """The declared type of the (first) result."""
        first = self.results[0] if self.results else None
        if first is None:
            raise self._wrong("result", "a tensor")
        return first

    @property
    def dtype(self) -> DType:
        """The declared element type of the (first) result."""
        return self.type.dtype

    def given(self, name: str) -> bool:
        """Whether the argument exists and is not None."""
        return self.args.get(name) is not None

    def tensor(self, name: str, dtype: DType | None = None) -> Node:
        """A tensor, cast to ``dtype`` when one is named."""
        value = self.args[name]
        if not isinstance(value, Node):
            raise self._wrong(name, "a tensor")
        return value if dtype is None else as_node(value, dtype)

    def maybe(self, name: str, dtype: DType | None = None) -> Node | None:
        """A tensor, or None when it is absent."""
        return self.tensor(name, dtype) if self.given(name) else None

    def tensors(self, name: str) -> list[Node]:
        """A list of tensors."""
        value = self.args[name]
        if not isinstance(value, list | tuple):
            raise self._wrong(name, "a list of tensors")
        nodes = [element for element in value if isinstance(element, Node)]
        if len(nodes) != len(value):
            raise self._wrong(name, "a list of tensors")
        return nodes

    def operand(self, name: str, dtype: DType) -> Node:
        """A tensor, or a Python number as a scalar, of ``dtype``."""
        return as_node(self.args[name], dtype)

    def integer(self, name: str) -> int:
        """A fixed integer."""
        value = self.args[name]
        if not isinstance(value, int):
            raise self._wrong(name, "a fixed integer")
        return value

    def integers(self, name: str, count: int) -> tuple[int, ...]:
        """``count`` fixed integers; a single one stands for all."""
        value = self.args[name]
        found = tuple(value) if isinstance(value, list | tuple) else (value,)
        integers = tuple(element for element in found if isinstance(element, int))
        if len(integers) != len(found) or len(integers) not in (1, count):
            raise self._wrong(name, f"{count} fixed integers")
        return integers * count if len(integers) == 1 else integers

    def number(self, name: str) -> float:
        """A fixed Python number."""
        value = self.args[name]
        if not isinstance(value, int | float):
            raise self._wrong(name, "a fixed number")
        return value

    def flag(self, name: str) -> bool:
        """A boolean, False when absent."""
        return bool(self.args.get(name))

    def text(self, name: str) -> str:
        """A string."""
        return str(self.args[name])

    def size(self, name: str) -> Size:
        """An integer or a symbolic one."""
        value = self.args[name]
        if not isinstance(value, int | Dim):
            raise self._wrong(name, "a size")
        return value

    def sizes_of(self, name: str) -> tuple[Size, ...]:
        """A list of sizes."""
        value = self.args[name]
        found = tuple(value) if isinstance(value, list | tuple) else (value,)
        sizes = tuple(element for element in found if isinstance(element, int | Dim))
        if len(sizes) != len(found):
            raise self._wrong(name, "a list of sizes")
        return sizes

    def axis(self, name: str, rank: int) -> int:
        """A dimension, counted from the front."""
        return self.integer(name) % max(rank, 1)

    def axes(self, name: str, rank: int) -> tuple[int, ...]:
        """Dimensions in rising order; all of them when the argument is absent or empty."""
        value = self.args.get(name)
        if value is None or value == []:
            return tuple(range(rank))
        found = value if isinstance(value, list | tuple) else [value]
        axes = [element % max(rank, 1) for element in found if isinstance(element, int)]
        return tuple(sorted(axes)) if rank else ()

    def _wrong(self, name: str, expected: str) -> GraphError:
        return GraphError(
            f"{self.op}: {name}",
            expected=expected,
            found=repr(self.args.get(name))[:80],
            remedy="The op runs as torch defines it.",
        )


Rule: TypeAlias = Callable[[Call], Result]
"""Lowers a call, or declines with None; the call then becomes an ``aten`` node."""


_COMPLEX = (DType.C64, DType.C128)


def as_node(value: Value, dtype: DType) -> Node:
    """A tensor, or a Python or symbolic number as a scalar, of ``dtype``."""
    match value:
        case Node() if value.dtype not in _COMPLEX or dtype in _COMPLEX:
            return cast(value, dtype)
        case Number(node):
            return cast(node, dtype)
        case Dim():
            return make("dim_value", size=value, dtype=dtype)
        case bool() | int() | float():
            return const(int(value) if dtype.is_integer else value, dtype)
    raise GraphError(
        "operand",
        expected="a tensor or a real number",
        found=type(value).__name__,
        remedy="The op runs as torch defines it.",
    )


def promoted(*values: Value) -> DType:
    """The type in which torch computes with these operands."""
    found = _sample(values[0])
    for value in values[1:]:
        dtype = torch.result_type(found, _sample(value))
        ranked = max(_rank(v) for v in values)
        found = torch.empty((1,) * ranked, dtype=dtype)
    return DType.from_torch(torch.result_type(found, found))


def full(value: float | Node, like: TensorType) -> Node:
    """A tensor of one value."""
    scalar = value if isinstance(value, Node) else as_node(value, like.dtype)
    return scalar if not like.shape else make("expand", scalar, shape=like.shape)


def scalar(value: float, like: Node) -> Node:
    """A constant of the element type of ``like``."""
    return as_node(value, like.dtype)


def _rank(value: Value) -> int:
    return min(value.type.rank, 1) if isinstance(value, Node) else 0


def _sample(value: Value) -> torch.Tensor | int | float | bool:
    if isinstance(value, Node):
        return torch.empty((1,) * _rank(value), dtype=value.dtype.torch)
    if isinstance(value, bool | int | float):
        return value
    return 1.0 if isinstance(value, Number) else 1
