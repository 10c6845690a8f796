"""Slices moved towards the leaves, to prove that parts of a value are equal.

``sliced(cos(concat(f, f)), …)`` of either half is ``cos(f)``: one node, since equal nodes are
one object.
"""

from __future__ import annotations

from ..ir.build import cast, make, permute, reshape
from ..ir.dims import Size, is_nonnegative
from ..ir.node import Node
from ..ir.ops.shape import sliced_size
from ..ir.schema import schema

MAX_DEPTH = 40  # beyond it a slice stays where it is: the chains of interest are short


def sliced(
    x: Node, dim: int, start: Size, stop: Size, step: int = 1, depth: int = MAX_DEPTH
) -> Node:
    """``x[..., start:stop:step, ...]`` along ``dim`` (bounds within the size), pushed towards
    the leaves.

    Goes through elementwise ops, concat, expand, permute, slices, and reshapes that keep the
    dimension or interleave it
    (``[..., n, 2] → [..., 2n]`` with ``step`` 2).
    """
    if start == 0 and stop == x.shape[dim] and step == 1:
        return x
    pushed = _pushed(x, dim, start, stop, step, depth - 1) if depth else None
    return pushed or cut(x, dim, start, stop, step)


def cut(x: Node, dim: int, start: Size, stop: Size, step: int = 1) -> Node:
    """The slice itself, composed with slices of ``x`` along the same dimension as canonicalise
    does it.
    """
    if start == 0 and stop == x.shape[dim] and step == 1:
        return x
    begin: Size = start
    if x.op == "slice" and x.attr("dim") == dim and x.attr("step") == 1:
        offset = x.attr("start")
        begin, x = start + _size(offset), x.operands[0]
    end = begin + (stop - start)
    if step != 1:
        end = begin + (sliced_size(x.shape[dim], start, stop, step) - 1) * step + 1
    return make("slice", x, dim=dim, start=begin, stop=end, step=step)


def _pushed(x: Node, dim: int, start: Size, stop: Size, step: int, depth: int) -> Node | None:
    if schema(x.op).elementwise:
        return _elementwise(x, dim, start, stop, step, depth)
    match x.op:
        case "concat":
            return _concat(x, dim, start, stop, step, depth)
        case "reshape":
            return _reshape(x, dim, start, stop, step, depth)
        case "permute":
            dims = _ints(x.attr("dims"))
            inner = sliced(x.operands[0], dims[dim], start, stop, step, depth)
            return permute(inner, *dims)
        case "expand":
            source = x.operands[0]
            inner = _operand(source, x, dim, start, stop, step, depth)
            count = sliced_size(x.shape[dim], start, stop, step)
            shape = tuple(count if a == dim else s for a, s in enumerate(x.shape))
            return make("expand", inner, shape=shape)
    return None


def _elementwise(x: Node, dim: int, start: Size, stop: Size, step: int, depth: int) -> Node:
    operands = [_operand(operand, x, dim, start, stop, step, depth) for operand in x.operands]
    if x.op == "cast":
        return cast(operands[0], x.dtype)
    return make(x.op, *operands, **dict(x.attrs))


def _operand(
    operand: Node, whole: Node, dim: int, start: Size, stop: Size, step: int, depth: int
) -> Node:
    """The slice of a broadcast operand that a slice of the result needs."""
    own = dim - (whole.type.rank - operand.type.rank)
    if own < 0 or (operand.shape[own] == 1 and whole.shape[dim] != 1):
        return operand
    return sliced(operand, own, start, stop, step, depth)


def _concat(x: Node, dim: int, start: Size, stop: Size, step: int, depth: int) -> Node | None:
    along = x.attr("dim")
    assert isinstance(along, int)
    if along != dim:
        parts = [sliced(part, dim, start, stop, step, depth) for part in x.operands]
        return make("concat", *parts, dim=along)
    offset: Size = 0
    for part in x.operands:
        end = offset + part.shape[dim]
        if is_nonnegative(start - offset) and is_nonnegative(end - stop):
            return sliced(part, dim, start - offset, stop - offset, step, depth)
        offset = end
    return None


def _reshape(x: Node, dim: int, start: Size, stop: Size, step: int, depth: int) -> Node | None:
    source = x.operands[0]
    count = sliced_size(x.shape[dim], start, stop, step)
    shape = tuple(count if a == dim else s for a, s in enumerate(x.shape))
    last = dim == x.type.rank - 1
    pairs = source.shape[-1] == step == 2 and source.shape[-2] * 2 == x.shape[dim]
    if last and pairs and start in (0, 1) and count == source.shape[-2]:
        return reshape(sliced(source, source.type.rank - 1, start, start + 1, 1, depth), *shape)
    axis = _same_axis(source.shape, x.shape, dim)
    if axis is None:
        return None
    return reshape(sliced(source, axis, start, stop, step, depth), *shape)


def _same_axis(before: tuple[Size, ...], after: tuple[Size, ...], dim: int) -> int | None:
    """The axis that a reshape by ones maps to ``dim``."""
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    if [before[a] for a in old] != [after[a] for a in new] or dim not in new:
        return None
    return old[new.index(dim)]


def _ints(values: object) -> tuple[int, ...]:
    assert isinstance(values, tuple)
    return values


def _size(value: object) -> Size:
    return 0 if value is None else value  # type: ignore[return-value]
