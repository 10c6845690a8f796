"""Nodes: immutable and interned, so structurally equal nodes are one object and CSE comes free."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)
class Node:
    """One operation and its result. Make it with ``make`` (ir/build.py), which infers ``type``.

    ``args`` may hold None for an optional operand that is absent. ``attrs`` is sorted by name and
    holds no None at its top level. Identity is structural: two nodes are equal exactly when they
    are the same object.
    """

    op: str
    args: tuple[Node | None, ...]
    attrs: tuple[tuple[str, Attr], ...]
    value_type: ValueType

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
        # The operands' ops only, and bodies by name: the whole expression may be a whole model.
        attrs = "".join(f", {name}={value!r}" for name, value in self.attrs)
        return f"{self.op}({', '.join('None' if a is None else a.op for a in self.args)}{attrs})"

    __repr__ = __str__


_interned: weakref.WeakValueDictionary[tuple[object, ...], Node] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def intern_node(
    op: str, args: tuple[Node | None, ...], attrs: Mapping[str, Attr], value_type: ValueType
) -> Node:
    """The one node with these fields. Attributes that are None are left out."""
    items = tuple(
        (name, clean_attr(op, attrs[name])) for name in sorted(attrs) if attrs[name] is not None
    )
    # Arguments are interned, so identity stands for structure.
    typed = tuple((name, _typed(value)) for name, value in items)
    key = (op, tuple(map(id, args)), typed, value_type)
    with _lock:
        node = _interned.get(key)
        if node is None:
            node = _interned[key] = Node(op, args, items, value_type)
    return node


def clean_attr(op: str, value: object) -> Attr:
    """``value`` as exactly one of the types of ``Attr``; GraphError when it is none of them.

    Subclasses become their base: ``numpy.float64`` would not print as itself.
    """
    if value is None or isinstance(value, bool | str | Dim | DType | TensorType):
        return value
    if isinstance(value, tuple):
        return tuple(clean_attr(op, element) for element in value)
    for base in (int, float):
        if isinstance(value, base):
            return base(value)
    from .graph import Graph

    if isinstance(value, Graph):
        return value
    raise GraphError(
        op,
        expected="attributes of int, float, bool, str, Dim, DType, TensorType, Graph or tuple",
        found=f"{type(value).__name__} {str(value)[:60]}",
        remedy="Convert the attribute: a list to a tuple, a symbolic int to a Dim.",
    )


def _typed(value: Attr) -> object:
    """A key in which 1, 1.0 and True differ, 0.0 and -0.0 too, and nan equals itself."""
    if isinstance(value, tuple):
        return tuple(map(_typed, value))
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, value)
