"""Tensors made from nothing: full, zeros, arange, tril and triu."""

from __future__ import annotations

from ...ir.build import cast, make, reshape
from ...ir.dims import Size
from ...ir.dtypes import DType
from ...ir.node import Node
from .base import Call, Rule, Value, as_node, full, scalar


def _filled(value: float) -> Rule:
    return lambda c: full(value, c.type)


def _full(c: Call) -> Node:
    name = next(n for n in ("fill_value", "value", "s") if n in c.args)
    return full(c.operand(name, c.dtype), c.type)


def _arange(c: Call) -> Node:
    (size,) = c.type.shape
    start, step = c.args.get("start") or 0, c.args.get("step") or 1
    return steps(start, step, size, c.dtype)


def steps(start: Value, step: Value, size: Size, dtype: DType) -> Node:
    """``start + i · step`` for i below ``size``."""
    whole = all(
        isinstance(x, int) or not isinstance(x, float) or x.is_integer() for x in (start, step)
    )
    # torch adds up in double before it rounds to the result's type
    wide = dtype if whole or not dtype.is_float else DType.F64
    x = make("iota", size=size, dtype=wide)
    if step != 1:
        x = make("mul", x, as_node(step, wide))
    if start != 0:
        x = make("add", x, as_node(start, wide))
    return cast(x, dtype)


def _linspace(c: Call) -> Node | None:
    (size,) = c.type.shape
    if not isinstance(size, int) or size < 2 or not c.dtype.is_float:
        return None
    start, end = c.number("start"), c.number("end")
    return steps(float(start), (end - start) / (size - 1), size, c.dtype)


def positions(rows: Size, columns: Size) -> tuple[Node, Node]:
    """Row indices i64[rows, 1] and column indices i64[1, columns]."""
    row = make("iota", size=rows, dtype=DType.I64)
    column = make("iota", size=columns, dtype=DType.I64)
    return reshape(row, rows, 1), reshape(column, 1, columns)


def _triangle(comparison: str) -> Rule:
    def rule(c: Call) -> Node:
        x = c.tensor("self")
        row, column = positions(*x.shape[-2:])
        diagonal = c.size("diagonal") if c.given("diagonal") else 0
        if diagonal != 0:
            row = make("add", row, as_node(diagonal, DType.I64))
        return make("where", make(comparison, column, row), x, scalar(0, x))

    return rule


def _eye(c: Call) -> Node:
    row, column = positions(*c.type.shape)
    return cast(make("eq", row, column), c.dtype)


def _scalar_tensor(c: Call) -> Node:
    return c.operand("s", c.dtype)


# What torch leaves uninitialised is 0 here: any value is right.
_ZEROS = ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided")
_FULLS = ("full", "full_like", "new_full", "fill")
RULES: dict[str, Rule] = {
    **{f"aten.{op}": _filled(0) for op in (*_ZEROS, "empty_permuted", "new_empty_strided")},
    **{f"aten.{op}": _filled(1) for op in ("ones", "ones_like", "new_ones")},
    **{f"aten.{op}": _full for op in _FULLS},
    "aten.scalar_tensor": _scalar_tensor,
    "aten.arange": _arange,
    "aten.linspace": _linspace,
    "aten.tril": _triangle("le"),
    "aten.triu": _triangle("ge"),
    "aten.eye": _eye,
}
