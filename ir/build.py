"""Making nodes: type inference on the way in, so that an ill-typed node never exists."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import GraphError
from .dims import Size
from .dtypes import DType
from .node import Attr, Node, clean_attr, intern_node
from .schema import OpSchema, attr_defaults, infer_type, schema
from .types import TensorType


def make(op: str, *args: Node | None, **attrs: Attr) -> Node:
    """The node ``op(*args, **attrs)``, with the op's defaults for attributes that are not given.

    Raises:
        GraphError: there is no such op, or operands or attributes do not fit it.
    """
    spec = schema(op)
    given: dict[str, Attr] = dict(attr_defaults(op))
    given.update((name, clean_attr(op, v)) for name, v in attrs.items() if v is not None)
    _check_attrs(spec, given)
    operands = _check_operands(spec, args)
    types = [None if arg is None else arg.value_type for arg in operands]
    return intern_node(op, operands, given, infer_type(spec, types, given))


def item(node: Node, index: int) -> Node:
    """Result ``index`` of a node with several."""
    return make("item", node, index=index)


def input_node(name: str, type_: TensorType) -> Node:
    """A graph input."""
    return make("input", name=name, type=type_)


def param(name: str, type_: TensorType) -> Node:
    """A weight by name."""
    return make("param", name=name, type=type_)


def const(value: float | int | bool, dtype: DType) -> Node:
    """A scalar constant, shape []; GraphError for a value that ``dtype`` cannot hold."""
    return make("const", value=_const_value(value, dtype), dtype=dtype)


def reshape(x: Node, *shape: Size) -> Node:
    """``x`` with another shape of equally many elements; ``x`` itself when nothing changes."""
    return x if x.shape == shape else make("reshape", x, shape=shape)


def permute(x: Node, *dims: int) -> Node:
    """``x`` with its dimensions in the given order."""
    return x if dims == tuple(range(x.type.rank)) else make("permute", x, dims=dims)


def cast(x: Node, dtype: DType) -> Node:
    """``x`` as another element type."""
    return x if x.dtype is dtype else make("cast", x, dtype=dtype)


def rebuild(node: Node, values: Mapping[Node, Node]) -> Node:
    """``node`` with its operands looked up in ``values``, its type inferred anew where one
    changed.
    """
    args = tuple(None if arg is None else values.get(arg, arg) for arg in node.args)
    if all(a is b for a, b in zip(args, node.args, strict=True)):
        return node
    return make(node.op, *args, **dict(node.attrs))


def _const_value(value: float | int | bool, dtype: DType) -> float | int | bool:
    if dtype.is_float or dtype.is_complex:
        return float(value)
    if dtype is DType.BOOL:
        return bool(value)
    limits = torch.iinfo(dtype.torch)
    if value != value or not limits.min <= value <= limits.max or int(value) != value:
        raise GraphError(
            f"const {value}",
            expected=f"an integer from {limits.min} to {limits.max} for {dtype}",
            found=str(value),
            remedy="Use an element type that holds the value.",
        )
    return int(value)


def _check_attrs(spec: OpSchema, attrs: Mapping[str, Attr]) -> None:
    unknown = sorted(set(attrs) - set(spec.attrs))
    if unknown:
        raise GraphError(
            spec.name,
            expected=f"attributes among {', '.join(spec.attrs) or 'none'}",
            found=", ".join(unknown),
            remedy="Correct the attribute's name.",
        )


def _check_operands(spec: OpSchema, args: tuple[Node | None, ...]) -> tuple[Node | None, ...]:
    variadic = bool(spec.operands) and spec.operands[-1].startswith("*")
    fixed = spec.operands[:-1] if variadic else spec.operands
    padded = args + (None,) * (len(fixed) - len(args))
    missing = [
        name for name, arg in zip(fixed, padded, strict=False) if arg is None and name[-1] != "?"
    ]
    if missing or None in padded[len(fixed) :] or (len(padded) > len(fixed) and not variadic):
        raise GraphError(
            spec.name,
            expected=f"operands ({', '.join(spec.operands)})",
            found=f"{len(args)} operands" + (f", {', '.join(missing)} absent" if missing else ""),
            remedy="Give the operands that the op takes.",
        )
    return padded
