"""Arithmetic in one spelling: constants stand on the right, and what does nothing is gone.

``div`` by a constant is ``mul``, ``sub`` of one is ``add``, small powers are products, a
division by a root is ``rsqrt``.
"""

from __future__ import annotations

import math

import torch

from ..ir.build import const, make
from ..ir.dtypes import DType
from ..ir.node import Node
from ..ir.ops.elementwise import COMMUTATIVE
from ..ir.schema import all_schemas
from ..ir.types import TensorType
from .match import Capture, P, any_node, equation, fit, is_number, number, scalar, value_of
from .rewrite import Context, Rule
from .steps import stepped_divisors

X, Y, C, D = any_node("x"), any_node("y"), scalar("c"), scalar("d")
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
_FLOATS = (DType.BF16, DType.F16, DType.F32, DType.F64)
# Element types whose values are all values of the next ones too.
_WITHIN: dict[DType, frozenset[DType]] = {
    DType.BOOL: frozenset({DType.I32, DType.I64, *_FLOATS}),
    DType.BF16: frozenset({DType.F32, DType.F64}),
    DType.F16: frozenset({DType.F32, DType.F64}),
    DType.F32: frozenset({DType.F64}),
    DType.I8: frozenset({DType.I16, DType.I32, DType.I64, DType.F32, DType.F64}),
    DType.U8: frozenset({DType.I16, DType.I32, DType.I64, DType.F32, DType.F64}),
    DType.I32: frozenset({DType.I64, DType.F64}),
}


def constant_last(node: Node, context: Context) -> Node | None:
    """``mul(2, x) → mul(x, 2)``; ``lt(2, x) → gt(x, 2)``."""
    a, b = node.operands
    if value_of(a) is None or value_of(b) is not None:
        return None
    return make(_MIRRORED.get(node.op, node.op), b, a)


def broadcast_itself(node: Node, context: Context) -> Node | None:
    """``add(x, expand(y)) → add(x, y)`` and ``add(x, reshape(y, (1, 1, D))) → add(x, y)``.

    Only where the other operands give the result its shape, and not by leading ones of their own.
    """
    for i, operand in enumerate(node.operands if len(node.operands) > 1 else ()):
        if operand.op != "expand" and not _adds_leading_ones(operand):
            continue
        source = operand.operands[0]
        others = [a for j, a in enumerate(node.operands) if j != i]
        alike = operand.op == "reshape" and all(
            _adds_leading_ones(a) for a in others if a.type.rank == node.type.rank
        )
        if not alike and _broadcasts(source.type, [a.type for a in others], node.type):
            operands = (*node.operands[:i], source, *node.operands[i + 1 :])
            return make(node.op, *operands, **dict(node.attrs))
    return None


def through_expand(node: Node, context: Context) -> Node | None:
    """``neg(expand(x)) → expand(neg(x))``: work on the smaller tensor. Constants with x come
    along.
    """
    wide = [a for a in node.operands if a.op == "expand"]
    if len(wide) != 1 or any(a.type.rank for a in node.operands if a is not wide[0]):
        return None
    narrow = [a.operands[0] if a is wide[0] else a for a in node.operands]
    return fit(make(node.op, *narrow, **dict(node.attrs)), node)


def cast_twice(node: Node, context: Context) -> Node | None:
    """``cast(cast(x: bf16, f32), f16) → cast(x, f16)``: the inner cast loses nothing."""
    inner = node.operands[0]
    if inner.op != "cast":
        return None
    x = inner.operands[0]
    if inner.dtype not in _WITHIN.get(x.dtype, ()):
        return None
    return x if x.dtype is node.dtype else make("cast", x, dtype=node.dtype)


def _adds_leading_ones(node: Node) -> bool:
    if node.op != "reshape":
        return False
    inner = node.operands[0].shape
    extra = node.type.rank - len(inner)
    return extra > 0 and node.shape == (1,) * extra + inner


def _broadcasts(source: TensorType, others: list[TensorType], result: TensorType) -> bool:
    rank = result.rank
    for axis, wanted in zip(range(-rank, 0), result.shape, strict=True):
        sizes = [t.shape[axis] for t in (source, *others) if -axis <= t.rank]
        if wanted != 1 and wanted not in sizes:
            return False
    return max(t.rank for t in (source, *others)) == rank


def _is_float(x: Node) -> bool:
    return x.dtype in _FLOATS


def div_constant(node: Node, context: Context) -> Node | None:
    """``div(x, 4) → mul(x, 0.25)``; not where the quotient is rounded, unless that is exact."""
    x, c = node.operands
    value = value_of(c)
    if not _is_float(x) or not value or not _is_normal(value, x.dtype):
        return None
    exact = abs(math.frexp(value)[0]) == 0.5
    if not _is_normal(1 / value, x.dtype) or not (exact or value not in _stepped(context)):
        return None
    return fit(make("mul", x, const(1 / value, x.dtype)), node)


def _stepped(context: Context) -> frozenset[float]:
    if context.graph is None:
        return frozenset()
    if "stepped" not in context.memo:
        context.memo["stepped"] = stepped_divisors(context.graph)
    found = context.memo["stepped"]
    assert isinstance(found, frozenset)
    return found


def _is_normal(value: float, dtype: DType) -> bool:
    """Whether ``dtype`` has ``value`` in full precision: neither overflown nor near to 0."""
    limits = torch.finfo(dtype.torch)
    return limits.tiny <= abs(value) <= limits.max


def _multiply_constants(x: Node, c: Node, d: Node) -> Node | None:
    a, b = value_of(c), value_of(d)
    if a is None or b is None:
        return None
    # x * 1e30 * 1e30 is 0 for x = 0, where x * inf is not a number.
    if _is_float(x) and a and b and not _is_normal(a * b, x.dtype):
        return None
    return make("mul", x, make("mul", c, d))


def _is_exact(x: Node) -> bool:
    """Whether sums may be taken in any order: (x + 1e20) - 1e20 is x for integers alone."""
    return x.dtype.is_integer


def _subtract(x: Node, c: Node) -> Node | None:
    value = value_of(c)
    if value is None or x.dtype in (DType.U8, DType.BOOL) or _lowest(value, x.dtype):
        return None
    return make("add", x, const(-value, x.dtype))


def _lowest(value: float, dtype: DType) -> bool:
    """Whether ``value`` is the integer that has no negative."""
    return dtype.is_integer and value == torch.iinfo(dtype.torch).min


def _power(x: Node, c: Node) -> Node | None:
    match value_of(c):
        case 2:
            return make("mul", x, x)
        case 3:
            return make("mul", make("mul", x, x), x)
    return _root(x, value_of(c)) if _is_float(x) else None


def _root(x: Node, exponent: float | int | bool | None) -> Node | None:
    op = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent or 0)
    return make(op, x) if op else None


def _mean(s: Node, x: Node, c: Node) -> Node | None:
    dims, count = s.attr("dims"), 1
    assert isinstance(dims, tuple)
    for dim in dims:
        assert isinstance(dim, int)
        size = x.shape[dim]
        if not isinstance(size, int):
            return None
        count *= size
    if not count or not _is_float(x) or not is_number(c, 1 / count):
        return None
    return make("mean", x, **dict(s.attrs))


ONE, ZERO = number(1), number(0)
_ELEMENTWISE = tuple(each.name for each in all_schemas() if each.elementwise)

ELEMENTWISE_RULES: tuple[Rule, ...] = (
    Rule("constant_last", (*sorted(COMMUTATIVE), *_MIRRORED), constant_last),
    Rule("broadcast_itself", _ELEMENTWISE, broadcast_itself),
    Rule("through_expand", _ELEMENTWISE, through_expand),
    Rule("cast_twice", ("cast",), cast_twice),
    equation("add_zero", P.add(X, ZERO), lambda x: x),
    equation("sub_zero", P.sub(X, ZERO), lambda x: x),
    equation("mul_one", P.mul(X, ONE), lambda x: x),
    equation("div_one", P.div(X, ONE), lambda x: x),
    equation("pow_one", P.pow(X, ONE), lambda x: x),
    equation("pow_constant", P.pow(X, C), lambda x, c: _power(x, c)),
    equation("neg_neg", P.neg(P.neg(X)), lambda x: x),
    equation("sub_from_zero", P.sub(ZERO, X), lambda x: make("neg", x)),
    equation("mul_minus_one", P.mul(X, number(-1)), lambda x: make("neg", x)),
    equation("sub_neg", P.sub(X, P.neg(Y)), lambda x, y: make("add", x, y)),
    equation("add_neg", P.add(X, P.neg(Y)), lambda x, y: make("sub", x, y)),
    equation("neg_sub", P.neg(P.sub(X, Y)), lambda x, y: make("sub", y, x)),
    equation("mul_neg_const", P.mul(P.neg(X), C), lambda x, c: make("mul", x, make("neg", c))),
    equation("mul_neg_neg", P.mul(P.neg(X), P.neg(Y)), lambda x, y: make("mul", x, y)),
    equation("sub_constant", P.sub(X, C), _subtract),
    Rule("div_constant", ("div",), div_constant),
    equation("div_sqrt", P.div(X, P.sqrt(Y)), lambda x, y: make("mul", x, make("rsqrt", y))),
    equation(
        "div_of_one", P.div(ONE, X), lambda x: make("reciprocal", x) if _is_float(x) else None
    ),
    equation("reciprocal_sqrt", P.reciprocal(P.sqrt(X)), lambda x: make("rsqrt", x)),
    equation("sqrt_reciprocal", P.sqrt(P.reciprocal(X)), lambda x: make("rsqrt", x)),
    equation("mul_reciprocal", P.mul(X, P.reciprocal(Y)), lambda x, y: make("div", x, y)),
    equation(
        "mul_constants",
        P.mul(P.mul(X, C), D),
        _multiply_constants,
    ),
    equation(
        "add_constants",
        P.add(P.add(X, C), D),
        lambda x, c, d: make("add", x, make("add", c, d)) if _is_exact(x) else None,
    ),
    equation(
        "add_to_difference",
        P.add(P.sub(C, X), D),
        lambda x, c, d: make("sub", make("add", c, d), x) if _is_exact(x) else None,
    ),
    equation("sum_to_mean", P.mul(Capture("s", P.sum(X)), C), _mean),
)
