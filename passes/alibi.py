"""ALiBi (Press et al., 2108.12409): a bias of ``slope[h] · j`` that models add to their scores.

Softmax does not see what is added to a whole row, so ``slope · j``, ``slope · (j - i)`` and
``slope · (j + 1 - S)`` are one.
Some models round the product to bfloat16, which cannot tell position 256 from 257; the op
computes it in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.build import cast, const, make, reshape
from ..ir.dims import Size
from ..ir.node import Node
from .affine import Affine, affine, axis_map
from .match import value_of


@dataclass(frozen=True, slots=True)
class _Outer:
    """``vector[index[axis]] · positions``: a vector [H] times index arithmetic."""

    vector: Node
    axis: int
    positions: Affine


def alibi_slopes(bias: Node, num_heads: Size) -> Node | None:
    """The slopes [H] of a bias that broadcasts to [B, H, S, L], None when it is no ALiBi."""
    found = _outer(bias, 20)
    if found is None or found.axis != -3 or found.vector.shape != (num_heads,):
        return None
    across = found.positions.factor(-1)
    if any(axis not in (-1, -2) for axis in found.positions.factors) or not isinstance(across, int):
        return None
    if across in (0, 1):
        return found.vector if across else None
    return make("mul", found.vector, const(across, found.vector.dtype))


def _outer(node: Node, depth: int) -> _Outer | None:
    if depth == 0:
        return None
    match node.op:
        case "mul":
            return _product(node, depth)
        case "cast" if node.dtype.is_float:
            inner = _outer(node.operands[0], depth - 1)
            return inner and _Outer(cast(inner.vector, node.dtype), inner.axis, inner.positions)
        case "expand":
            return _outer(node.operands[0], depth - 1)
        case "reshape":
            return _moved(node, _outer(node.operands[0], depth - 1))
    return None


def _product(node: Node, depth: int) -> _Outer | None:
    for a, b in (node.operands, node.operands[::-1]):
        if value_of(b) is not None:
            inner = _outer(a, depth - 1)
            if inner is not None:
                vector = make("mul", inner.vector, const(float(value_of(b) or 0), node.dtype))
                return _Outer(vector, inner.axis, inner.positions)
        axes = [axis - a.type.rank for axis, size in enumerate(a.shape) if size != 1]
        positions = affine(b)
        if len(axes) == 1 and positions is not None and positions.factor(axes[0]) == 0:
            return _Outer(reshape(a, a.shape[axes[0]]), axes[0], positions)
    return None


def _moved(node: Node, inner: _Outer | None) -> _Outer | None:
    moved = axis_map(node.operands[0].shape, node.shape)
    if inner is None or moved is None:
        return None
    if any(axis not in moved for axis in (inner.axis, *inner.positions.factors)):
        return None
    factors = {moved[a]: f for a, f in inner.positions.factors.items()}
    return _Outer(inner.vector, moved[inner.axis], Affine(factors, inner.positions.constant))
