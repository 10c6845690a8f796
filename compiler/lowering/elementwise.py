"""Arithmetic, comparisons, logic: explicit casts bring operands to torch's computation type."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...ir.build import cast, make
from ...ir.dtypes import DType
from ...ir.node import Node
from .base import Call, Rule, as_node, promoted, scalar

_ON_BOOL = {
    "add": "logical_or",
    "mul": "logical_and",
    "maximum": "logical_or",
    "minimum": "logical_and",
}


def _binary(op: str, left: str = "self", right: str = "other") -> Rule:
    def rule(c: Call) -> Node:
        a, b = c.operand(left, c.dtype), c.operand(right, c.dtype)
        return make(_ON_BOOL.get(op, op) if c.dtype is DType.BOOL else op, a, b)

    return rule


def _unary(op: str) -> Rule:
    return lambda c: make(op, c.tensor("self", c.dtype))


def _composed(function: Callable[[Node], Node]) -> Rule:
    return lambda c: function(c.tensor("self", c.dtype))


def _compare(op: str) -> Rule:
    def rule(c: Call) -> Node:
        dtype = promoted(c.args["self"], c.args["other"])
        return make(op, c.operand("self", dtype), c.operand("other", dtype))

    return rule


def _logical(op: str) -> Rule:
    def rule(c: Call) -> Node | None:
        if c.dtype is not DType.BOOL:
            return None
        return make(op, c.operand("self", DType.BOOL), c.operand("other", DType.BOOL))

    return rule


def _add(c: Call) -> Node:
    return _scaled_sum(c, "add", "self", "other")


def _sub(c: Call) -> Node:
    return _scaled_sum(c, "sub", "self", "other")


def _rsub(c: Call) -> Node:
    other, x = c.operand("other", c.dtype), _times_alpha(c, c.operand("self", c.dtype))
    return make("sub", other, x)


def _scaled_sum(c: Call, op: str, left: str, right: str) -> Node:
    a, b = c.operand(left, c.dtype), _times_alpha(c, c.operand(right, c.dtype))
    return make(_ON_BOOL.get(op, op) if c.dtype is DType.BOOL else op, a, b)


def _times_alpha(c: Call, x: Node) -> Node:
    alpha = c.args.get("alpha", 1)
    return x if alpha in (1, None) else make("mul", x, as_node(alpha, x.dtype))


def _div(c: Call) -> Node | None:
    a, b = c.operand("self", c.dtype), c.operand("other", c.dtype)
    mode = c.args.get("rounding_mode")
    if mode == "floor":
        return make("floordiv", a, b)
    if mode == "trunc":
        return trunc(make("div", a, b)) if c.dtype.is_float else None
    return make("div", a, b)


def trunc(x: Node) -> Node:
    """Rounds towards zero."""
    return make("where", make("lt", x, scalar(0, x)), make("ceil", x), make("floor", x))


def _fmod(c: Call) -> Node:
    a, b = c.operand("self", c.dtype), c.operand("other", c.dtype)
    return make("mul", make("sign", a), make("remainder", make("abs", a), make("abs", b)))


def _clamp(c: Call) -> Node:
    x = c.tensor("self", c.dtype)
    if c.given("min"):
        x = make("maximum", x, c.operand("min", c.dtype))
    if c.given("max"):
        x = make("minimum", x, c.operand("max", c.dtype))
    return x


def _where(c: Call) -> Node:
    condition = c.tensor("condition", DType.BOOL)
    return make("where", condition, c.operand("self", c.dtype), c.operand("other", c.dtype))


def _masked_fill(c: Call) -> Node:
    mask = c.tensor("mask", DType.BOOL)
    return make("where", mask, c.operand("value", c.dtype), c.tensor("self", c.dtype))


def _logical_not(c: Call) -> Node | None:
    if c.op == "aten.bitwise_not" and c.dtype is not DType.BOOL:
        return None
    return make("logical_not", c.tensor("self", DType.BOOL))


def _isinf(c: Call) -> Node:
    x = c.tensor("self")
    magnitude = make("abs", x if x.dtype.is_float else cast(x, DType.F32))
    return make("eq", magnitude, scalar(math.inf, magnitude))


def _isfinite(c: Call) -> Node:
    x = c.tensor("self")
    magnitude = make("abs", x if x.dtype.is_float else cast(x, DType.F32))
    return make("lt", magnitude, scalar(math.inf, magnitude))


def _isnan(c: Call) -> Node:
    x = c.tensor("self")
    return make("isnan", x if x.dtype.is_float else cast(x, DType.F32))


def _addcmul(c: Call) -> Node:
    product = make("mul", c.tensor("tensor1", c.dtype), c.tensor("tensor2", c.dtype))
    return make("add", c.tensor("self", c.dtype), _times_value(c, product))


def _addcdiv(c: Call) -> Node:
    quotient = make("div", c.tensor("tensor1", c.dtype), c.tensor("tensor2", c.dtype))
    return make("add", c.tensor("self", c.dtype), _times_value(c, quotient))


def _times_value(c: Call, x: Node) -> Node:
    value = c.args.get("value", 1)
    return x if value in (1, None) else make("mul", as_node(value, x.dtype), x)


def _lerp(c: Call) -> Node:
    start, end = c.tensor("self", c.dtype), c.tensor("end", c.dtype)
    return make("add", start, make("mul", c.operand("weight", c.dtype), make("sub", end, start)))


def _square(c: Call) -> Node:
    x = c.tensor("self", c.dtype)
    return make("pow", x, scalar(2, x))


def expm1(x: Node) -> Node:
    """``exp(x) - 1`` without cancellation near 0: tanh(x / 2) · (exp(x) + 1)."""
    half = make("tanh", make("mul", x, scalar(0.5, x)))
    return make("mul", half, make("add", make("exp", x), scalar(1, x)))


def _log_base(base: float) -> Callable[[Node], Node]:
    """The logarithm to ``base``, exact for its powers as torch's is: they are floored."""

    def log(x: Node) -> Node:
        near = make("mul", make("log", x), scalar(1 / math.log(base), x))
        whole = make("round", near)
        exact = make("eq", make("pow", scalar(base, x), whole), x)
        return make("where", exact, whole, near)

    return log


def _round(c: Call) -> Node | None:
    decimals = c.args.get("decimals", 0)
    return make("round", c.tensor("self", c.dtype)) if decimals in (0, None) else None


def _exp2(x: Node) -> Node:
    return make("pow", scalar(2, x), x)


def _tan(x: Node) -> Node:
    return make("div", make("sin", x), make("cos", x))


def _half_exp(x: Node) -> Node:
    """``exp(x) / 2``, finite also where ``exp(x)`` alone is not."""
    root = make("exp", make("mul", x, scalar(0.5, x)))
    return make("mul", make("mul", root, scalar(0.5, x)), root)


def _sinh(x: Node) -> Node:
    # (e + e / (e + 1)) / 2 with e = expm1(|x|) keeps small x exact
    size = make("abs", x)
    grown = expm1(size)
    ratio = make("div", grown, make("add", grown, scalar(1, x)))
    small = make("mul", make("add", grown, ratio), scalar(0.5, x))
    # which overflows early in float16; from 4 on little cancels
    large = make("sub", _half_exp(size), _falling(size))
    found = make("where", make("gt", size, scalar(4, x)), large, small)
    return make("mul", make("sign", x), found)


def _falling(size: Node) -> Node:
    return make("mul", make("exp", make("neg", size)), scalar(0.5, size))


def _cosh(x: Node) -> Node:
    size = make("abs", x)
    return make("add", _half_exp(size), _falling(size))


_SAME_NAME = (
    *("neg", "abs", "exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos"),
    *("tanh", "sigmoid", "erf", "floor", "ceil", "sign"),
)

RULES: dict[str, Rule] = {
    **{f"aten.{op}": _unary(op) for op in _SAME_NAME},
    **{f"aten.{op}": _compare(op) for op in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"aten.logical_{op}": _logical(f"logical_{op}") for op in ("and", "or", "xor")},
    **{f"aten.bitwise_{op}": _logical(f"logical_{op}") for op in ("and", "or", "xor")},
    **{f"aten.__{op}__": _logical(f"logical_{op}") for op in ("and", "or")},
    "aten.logical_not": _logical_not,
    "aten.bitwise_not": _logical_not,
    "aten.add": _add,
    "aten.sub": _sub,
    "aten.rsub": _rsub,
    "aten.mul": _binary("mul"),
    "aten.div": _div,
    "aten.true_divide": _div,
    "aten.floor_divide": _binary("floordiv"),
    "aten.remainder": _binary("remainder"),
    "aten.fmod": _fmod,
    "aten.pow": _binary("pow", "self", "exponent"),
    "aten.maximum": _binary("maximum"),
    "aten.minimum": _binary("minimum"),
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.clamp_max": _clamp,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.isnan": _isnan,
    "aten.isinf": _isinf,
    "aten.isfinite": _isfinite,
    "aten.addcmul": _addcmul,
    "aten.addcdiv": _addcdiv,
    "aten.lerp": _lerp,
    "aten.round": _round,
    "aten.square": _square,
    "aten.sgn": _unary("sign"),
    "aten.trunc": _composed(trunc),
    "aten.expm1": _composed(expm1),
    "aten.exp2": _composed(_exp2),
    "aten.log2": _composed(_log_base(2)),
    "aten.log10": _composed(_log_base(10)),
    "aten.tan": _composed(_tan),
    "aten.sinh": _composed(_sinh),
    "aten.cosh": _composed(_cosh),
}
