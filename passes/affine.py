"""Index arithmetic: integer tensors whose elements are a sum of multiples of their own indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.dims import Dim, Size
from ..ir.node import Node


@dataclass(frozen=True, slots=True)
class Affine:
    """``constant + Σ factors[axis] · index[axis]``; axes count from the last, as -1, -2, …"""

    factors: Mapping[int, Size]
    constant: Size

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        """The sum, or the difference for ``sign`` -1."""
        axes = {*self.factors, *other.factors}
        sums = {a: self.factor(a) + other.factor(a) * sign for a in axes}
        kept = {a: f for a, f in sums.items() if f != 0}
        return Affine(kept, self.constant + other.constant * sign)

    def times(self, factor: Size) -> Affine:
        """Each element multiplied."""
        kept = {a: f * factor for a, f in self.factors.items() if factor != 0}
        return Affine(kept, self.constant * factor)

    def factor(self, axis: int) -> Size:
        """What one step along ``axis`` adds."""
        return self.factors.get(axis, 0)


def affine(node: Node, depth: int = 30) -> Affine | None:
    """``node`` as index arithmetic, None where it is none. Casts to floats count as exact."""
    if depth == 0:
        return None
    known = _leaf(node)
    if known is not None or not node.operands:
        return known
    parts = [affine(operand, depth - 1) for operand in node.operands]
    first, last = parts[0], parts[-1]
    if first is None or last is None:
        return None
    match node.op:
        case "cast":
            return first
        case "neg":
            return first.times(-1)
        case "add":
            return first.plus(last)
        case "sub":
            return first.plus(last, -1)
        case "mul":
            return _product(first, last)
    return _moved(node, first)


def axis_map(before: tuple[Size, ...], after: tuple[Size, ...]) -> dict[int, int] | None:
    """Where a reshape that adds or drops ones puts each axis (counted from the last); None for
    other reshapes.
    """
    old = [axis - len(before) for axis, size in enumerate(before) if size != 1]
    new = [axis - len(after) for axis, size in enumerate(after) if size != 1]
    if [before[a] for a in old] != [after[a] for a in new]:
        return None
    return dict(zip(old, new, strict=True))


def _leaf(node: Node) -> Affine | None:
    if node.op == "iota":
        return Affine({-1: 1}, 0)
    value = node.attr("size") if node.op == "dim_value" else node.attr("value")
    if node.op not in ("const", "dim_value") or isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return Affine({}, int(value))
    return Affine({}, value) if isinstance(value, int | Dim) else None


def _product(a: Affine, b: Affine) -> Affine | None:
    if not a.factors:
        return b.times(a.constant)
    return a.times(b.constant) if not b.factors else None


def _moved(node: Node, inner: Affine) -> Affine | None:
    """The same elements under other indices: reshape by ones, expand, permute, slice."""
    x = node.operands[0]
    match node.op:
        case "expand":
            return inner
        case "reshape":
            moved = axis_map(x.shape, node.shape)
        case "permute":
            dims, rank = node.attr("dims"), x.type.rank
            assert isinstance(dims, tuple)
            moved = {d - rank: i - rank for i, d in enumerate(dims) if isinstance(d, int)}
        case "slice":
            return _sliced(node, inner)
        case _:
            return None
    if moved is None or any(axis not in moved for axis in inner.factors):
        return None
    return Affine({moved[a]: f for a, f in inner.factors.items()}, inner.constant)


def _sliced(node: Node, inner: Affine) -> Affine:
    dim, start, step = node.attr("dim"), node.attr("start"), node.attr("step")
    assert isinstance(dim, int) and isinstance(start, int | Dim) and isinstance(step, int)
    axis = dim - node.type.rank
    factor = inner.factor(axis)
    factors = {a: f * step if a == axis else f for a, f in inner.factors.items()}
    return Affine(factors, inner.constant + factor * start)
