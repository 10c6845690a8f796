"""Gathering by index tensors, where torch lets indices count from the end."""

from __future__ import annotations

from ...ir.build import cast, make, reshape
from ...ir.dims import Size, product
from ...ir.dtypes import DType
from ...ir.node import Node
from .base import Call, Rule, as_node, scalar
from .create import steps
from .shape import expand, slice_of

_KEEP_SIGN = ("reshape", "permute", "expand", "slice", "concat", "cast", "flip", "maximum")
_GROW = ("add", "mul", "floordiv", "cumsum", "sum", "minimum", "pad")


def never_negative(x: Node) -> bool:
    """Whether an integer value is provably >= 0: positions, counts, and what is made of them."""
    match x.op:
        case "iota" | "dim_value" | "argmax" | "argmin":
            return True
        case "const":
            return float(str(x.attr("value")).replace("True", "1").replace("False", "0")) >= 0
        case "cast":
            return x.operands[0].dtype in (DType.BOOL, DType.U8) or never_negative(x.operands[0])
        case "item":
            return x.operands[0].op == "topk" and x.attr("index") == 1
        case "maximum":
            return any(never_negative(operand) for operand in x.operands)
        case op if op in _KEEP_SIGN or op in _GROW:
            return all(never_negative(operand) for operand in x.operands)
    return False


def from_front(index: Node, size: Size) -> Node:
    """Indices with the negative ones counted from the front."""
    if never_negative(index):
        return index
    shifted = make("add", index, as_node(size, index.dtype))
    return make("where", make("lt", index, scalar(0, index)), shifted, index)


def _index(c: Call) -> Node | None:
    """``x[:, i, j]``: index tensors of adjacent dimensions."""
    x, found = c.tensor("self"), c.args["indices"]
    if not isinstance(found, list | tuple):
        return None
    places = [d for d, index in enumerate(found) if isinstance(index, Node)]
    indices = [index for index in found if isinstance(index, Node)]
    if any(not index.dtype.is_integer for index in indices):
        return None
    if places != list(range(places[0], places[0] + len(places))):
        return None
    first, last = places[0], places[-1] + 1
    flat = _linear(x.shape[first:last], indices)
    merged = reshape(x, *x.shape[:first], product(x.shape[first:last]), *x.shape[last:])
    return make("index_select", merged, flat, dim=first)


def _linear(sizes: tuple[Size, ...], indices: list[Node]) -> Node:
    """One index into dimensions of ``sizes`` seen as one."""
    flat = from_front(indices[0], sizes[0])
    for size, index in zip(sizes[1:], indices[1:], strict=True):
        index = from_front(cast(index, flat.dtype), size)
        flat = make("add", make("mul", flat, as_node(size, flat.dtype)), index)
    return flat


def _index_select(c: Call) -> Node | None:
    x = c.tensor("self")
    if not x.type.rank:
        return None
    return make("index_select", x, c.tensor("index"), dim=c.axis("dim", x.type.rank))


def _gather(c: Call) -> Node | None:
    x, index = c.tensor("self"), c.tensor("index")
    if x.type.rank != index.type.rank or not x.type.rank:
        return None
    return make("gather", x, index, dim=c.axis("dim", x.type.rank))


_LONGEST_SCATTER = 64


def _scatter(c: Call) -> Node | None:
    """Writes at few places of each row, seen as a choice at every place: it mixes no rows."""
    x, index = c.tensor("self"), c.tensor("index")
    if x.type.rank != index.type.rank or not x.type.rank or c.given("reduce"):
        return None
    dim = c.axis("dim", x.type.rank)
    count, rows = index.shape[dim], [*x.shape[:dim], *x.shape[dim + 1 :]]
    if not isinstance(count, int) or count > _LONGEST_SCATTER:
        return None
    if [*index.shape[:dim], *index.shape[dim + 1 :]] != rows:
        return None
    places = make("iota", size=x.shape[dim], dtype=index.dtype)
    places = reshape(places, x.shape[dim], *((1,) * (x.type.rank - dim - 1)))
    src = c.args["value"] if "value" in c.args else c.args["src"]
    if isinstance(src, Node) and src.type.rank and src.shape != index.shape:
        return None
    for i in range(count):
        chosen = make("eq", slice_of(index, dim, i, i + 1), places)
        value = src
        if isinstance(src, Node) and src.type.rank:
            value = slice_of(src, dim, i, i + 1)
        x = make("where", chosen, as_node(value, x.dtype), x)
    return x


def _one_hot(c: Call) -> Node | None:
    x, classes = c.tensor("self"), c.integer("num_classes")
    if classes < 0:
        return None
    row = make("iota", size=classes, dtype=x.dtype)
    return cast(make("eq", reshape(x, *x.shape, 1), row), c.dtype)


def _as_strided(c: Call) -> Node | None:
    """Gathers from the flat, row-major operand: strides are not part of the IR."""
    x = c.tensor("self")
    if "self" not in c.contiguous:
        return None
    sizes, strides = c.sizes_of("size"), c.sizes_of("stride")
    offset: Size = c.size("storage_offset") if c.given("storage_offset") else 0
    place = as_node(offset, DType.I64)
    for d, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        along = steps(0, stride, size, DType.I64)
        place = make("add", place, reshape(along, size, *((1,) * (len(sizes) - d - 1))))
    flat = reshape(x, product(x.shape))
    return make("index_select", flat, expand(place, sizes), dim=0)


def _unfold(c: Call) -> Node | None:
    x = c.tensor("self")
    if not x.type.rank:
        return None
    dim, window, step = c.axis("dimension", x.type.rank), c.size("size"), c.size("step")
    count = c.type.shape[dim]
    starts = reshape(steps(0, step, count, DType.I64), count, 1)
    inner = reshape(steps(0, 1, window, DType.I64), 1, window)
    picked = make("index_select", x, make("add", starts, inner), dim=dim)
    order = [d for d in range(picked.type.rank) if d != dim + 1] + [dim + 1]
    return make("permute", picked, dims=tuple(order))


RULES: dict[str, Rule] = {
    "aten.index": _index,
    "aten._unsafe_index": _index,
    "aten.index_select": _index_select,
    "aten.gather": _gather,
    "aten.scatter": _scatter,
    "aten.one_hot": _one_hot,
    "aten.as_strided": _as_strided,
    "aten.unfold": _unfold,
}
