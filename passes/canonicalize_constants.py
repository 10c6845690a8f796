"""Values known now: arithmetic of constants, of sizes, and whatever moves a constant about.

A tensor with one value throughout is ``const``, or ``expand(const)`` where it has a shape.
"""

from __future__ import annotations

import torch

from ..ir.build import const, make, reshape
from ..ir.dims import Dim, Size, call
from ..ir.dtypes import DType
from ..ir.node import Node
from ..ir.schema import all_schemas, schema
from .match import full, value_of
from .push import sliced
from .rewrite import Context, Rule

_MOVES = ("reshape", "permute", "slice", "expand", "gather", "index_select", "embedding", "flip")
_SIZE_OPS = ("add", "sub", "mul", "floordiv", "minimum", "maximum")


def fold_constants(node: Node, context: Context) -> Node | None:
    """``add(f32(1), f32(2)) → f32(3)``, also of broadcast constants."""
    values = [value_of(operand) for operand in node.operands]
    if not values or any(value is None for value in values) or not _foldable(node.dtype):
        return None
    scalars = [
        torch.tensor(value, dtype=operand.dtype.torch)
        for value, operand in zip(values, node.operands, strict=True)
    ]
    result = schema(node.op).reference(*scalars, **dict(node.attrs))
    assert isinstance(result, torch.Tensor)
    return full(result.item(), node)


def move_constant(node: Node, context: Context) -> Node | None:
    """``reshape(expand(c)) → expand(c)``, and so for all that only picks elements."""
    value = value_of(node.operands[0])
    if value is None or (node.op == "expand" and node.operands[0].op == "const"):
        return None
    return full(value, node)


def join_constants(node: Node, context: Context) -> Node | None:
    """``concat(expand(c), expand(c)) → expand(c)``."""
    values = {_key(value_of(operand)) for operand in node.operands}
    value = value_of(node.operands[0])
    return full(value, node) if len(values) == 1 and value is not None else None


def count_up(node: Node, context: Context) -> Node | None:
    """``cumsum(expand(c), dim=d) → (iota + 1) * c`` along d: positions that a model counts from
    a mask of ones.
    """
    value, dim = value_of(node.operands[0]), node.attr("dim")
    if value is None or not isinstance(dim, int):
        return None
    size = node.shape[dim]
    index = make("add", make("iota", size=size, dtype=node.dtype), const(1, node.dtype))
    along = reshape(index, *(size if axis == dim else 1 for axis in range(node.type.rank)))
    return make("expand", make("mul", along, const(value, node.dtype)), shape=node.shape)


def fold_sizes(node: Node, context: Context) -> Node | None:
    """``add(dim_value(size=S), i64(1)) → dim_value(size=S + 1)``."""
    sizes = [_size(operand) for operand in node.operands]
    if len(sizes) != 2 or not node.dtype.is_integer or not any(isinstance(s, Dim) for s in sizes):
        return None
    a, b = sizes
    if a is None or b is None:
        return None
    return _dim_value(_combine(node.op, a, b), node.dtype)


def cast_size(node: Node, context: Context) -> Node | None:
    """``cast(dim_value(size=S, dtype=i64), dtype=f32) → dim_value(size=S, dtype=f32)``."""
    source = node.operands[0]
    size = source.attr("size")
    if source.op != "dim_value" or not isinstance(size, int | Dim) or not source.dtype.is_integer:
        return None
    return _dim_value(size, node.dtype) if node.dtype is not DType.BOOL else None


def known_size(node: Node, context: Context) -> Node | None:
    """``dim_value(size=7) → i64(7)``."""
    size = node.attr("size")
    return const(size, node.dtype) if isinstance(size, int) else None


def single_index(node: Node, context: Context) -> Node | None:
    """``iota(size=1) → expand(0)``."""
    return full(0, node) if node.attr("size") == 1 else None


def slice_of_iota(node: Node, context: Context) -> Node | None:
    """``slice(iota(size=9), start=2, stop=5) → add(iota(size=3), 2)``."""
    source, start = node.operands[0], node.attr("start")
    if source.op != "iota" or node.attr("step") != 1 or not isinstance(start, int | Dim):
        return None
    count = make("iota", size=node.shape[0], dtype=node.dtype)
    return make("add", count, _dim_value(start, node.dtype))


def slice_of_indices(node: Node, context: Context) -> Node | None:
    """A slice of index arithmetic works on fewer indices: masks and biases that models cut to
    length.
    """
    x = node.operands[0]
    dim, start, stop, step = (node.attr(name) for name in ("dim", "start", "stop", "step"))
    if x.op in ("iota", "slice") or not _made_of_indices(x, 12):
        return None
    result = sliced(x, dim, start, stop, step)  # type: ignore[arg-type]
    return None if result.op == "slice" and result.operands[0] is x else result


def _made_of_indices(node: Node, depth: int) -> bool:
    if node.op in ("iota", "const", "dim_value"):
        return True
    moves = schema(node.op).elementwise or node.op in ("reshape", "expand", "permute")
    return bool(depth and moves) and all(_made_of_indices(o, depth - 1) for o in node.operands)


def _foldable(dtype: DType) -> bool:
    return dtype.is_float or dtype.is_integer or dtype is DType.BOOL


def _key(value: float | int | bool | None) -> str:
    return repr(value)


def _size(node: Node) -> Size | None:
    size = node.attr("size") if node.op == "dim_value" else node.attr("value")
    if node.op not in ("dim_value", "const") or isinstance(size, bool):
        return None
    return size if isinstance(size, int | Dim) else None


def _combine(op: str, a: Size, b: Size) -> Size:
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "floordiv":
            return a // b
    return call("min" if op == "minimum" else "max", a, b)


def _dim_value(size: Size, dtype: DType) -> Node:
    return make("dim_value", size=size, dtype=dtype)


_ELEMENTWISE = tuple(each.name for each in all_schemas() if each.elementwise)
CONSTANT_RULES: tuple[Rule, ...] = (
    Rule("fold_constants", _ELEMENTWISE, fold_constants),
    Rule("move_constant", _MOVES, move_constant),
    Rule("join_constants", ("concat",), join_constants),
    Rule("count_up", ("cumsum",), count_up),
    Rule("fold_sizes", _SIZE_OPS, fold_sizes),
    Rule("cast_size", ("cast",), cast_size),
    Rule("known_size", ("dim_value",), known_size),
    Rule("slice_of_iota", ("slice",), slice_of_iota),
    Rule("slice_of_indices", ("slice",), slice_of_indices),
    Rule("single_index", ("iota",), single_index),
)
