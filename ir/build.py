"""Making nodes: type inference on the way in, so that an ill-typed node never exists."""

from __future__ import annotations

from ..errors import GraphError
from .dims import Size
from .dtypes import DType
from .node import Attr, Node, intern_node
from .schema import OpSchema, schema
from .types import TensorType


def make(op: str, *args: Node | None, **attrs: Attr) -> Node:
    """The node ``op(*args, **attrs)``; GraphError when the op does not exist or the types do not fit."""
    spec = schema(op)
    given = {name: value for name, value in attrs.items() if value is not None}
    _check_attrs(spec, given)
    operands = _check_operands(spec, args)
    types = [None if arg is None else arg.value_type for arg in operands]
    return intern_node(op, operands, given, spec.infer(*types, **given))


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
    """A scalar constant, shape []."""
    if dtype.is_float:
        value = float(value)
    elif dtype is DType.BOOL:
        value = bool(value)
    return make("const", value=value, dtype=dtype)


def reshape(x: Node, *shape: Size) -> Node:
    """``x`` with another shape of equally many elements; ``x`` itself when nothing changes."""
    return x if x.shape == shape else make("reshape", x, shape=shape)


def permute(x: Node, *dims: int) -> Node:
    """``x`` with its dimensions in the given order."""
    return x if dims == tuple(range(x.type.rank)) else make("permute", x, dims=dims)


def cast(x: Node, dtype: DType) -> Node:
    """``x`` as another element type."""
    return x if x.dtype is dtype else make("cast", x, dtype=dtype)


def _check_attrs(spec: OpSchema, attrs: dict[str, Attr]) -> None:
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
    if missing or (len(padded) > len(fixed) and not variadic):
        raise GraphError(
            spec.name,
            expected=f"operands ({', '.join(spec.operands)})",
            found=f"{len(args)} operands" + (f", {', '.join(missing)} absent" if missing else ""),
            remedy="Give the operands that the op takes.",
        )
    return padded
