"""Nodes: immutable, interned. Structurally equal nodes are one object, so common subexpressions are shared."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, Union

from ..errors import GraphError
from .dims import Dim
from .dtypes import DType
from .types import TensorType, TupleType, ValueType

if TYPE_CHECKING:
    from .graph import Graph

Attr: TypeAlias = Union[
    int, float, bool, str, None, Dim, DType, TensorType, "Graph", tuple["Attr", ...]
]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Node:
    """One operation and its result. Make it with ``make`` (ir/build.py), which infers ``type``.

    ``args`` may hold None for an optional operand that is absent. ``attrs`` is sorted by name. Identity is
    structural: two nodes are equal exactly when they are the same object.
    """

    op: str
    args: tuple[Node | None, ...]
    attrs: tuple[tuple[str, Attr], ...]
    value_type: ValueType = field(repr=False)

    @property
    def type(self) -> TensorType:
        """The tensor type of a single-result node; GraphError for a tuple."""
        if isinstance(self.value_type, TensorType):
            return self.value_type
        raise GraphError(
            self.op,
            expected="a single result",
            found=f"{len(self.value_type)} results",
            remedy="Pick one with item(node, index).",
        )

    @property
    def types(self) -> TupleType:
        """The types of all results, a tuple of one for single-result nodes."""
        return (self.value_type,) if isinstance(self.value_type, TensorType) else self.value_type

    @property
    def dtype(self) -> DType:
        """Element type of a single-result node."""
        return self.type.dtype

    @property
    def shape(self) -> tuple[int | Dim, ...]:
        """Shape of a single-result node."""
        return self.type.shape

    @property
    def operands(self) -> tuple[Node, ...]:
        """The operands that are present, in order."""
        return tuple(arg for arg in self.args if arg is not None)

    def attr(self, name: str) -> Attr:
        """The attribute ``name``, None when it is absent."""
        return next((value for key, value in self.attrs if key == name), None)

    def __str__(self) -> str:
        attrs = "".join(f", {k}={v}" for k, v in self.attrs)
        return f"{self.op}({', '.join('None' if a is None else a.op for a in self.args)}{attrs})"


_interned: weakref.WeakValueDictionary[tuple[object, ...], Node] = weakref.WeakValueDictionary()


def intern_node(
    op: str, args: tuple[Node | None, ...], attrs: Mapping[str, Attr], value_type: ValueType
) -> Node:
    """The one node with these fields. Attributes that are None are left out."""
    items = tuple(sorted((k, v) for k, v in attrs.items() if v is not None))
    # Arguments are interned, so identity stands for structure; 1, 1.0 and True must not meet in the key.
    key = (op, tuple(map(id, args)), tuple((k, _typed(v)) for k, v in items), value_type)
    node = _interned.get(key)
    if node is None:
        node = _interned[key] = Node(op, args, items, value_type)
    return node


def _typed(value: Attr) -> object:
    if isinstance(value, tuple):
        return tuple(map(_typed, value))
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, value)
