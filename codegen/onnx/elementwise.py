"""Elementwise ops as ONNX."""

from __future__ import annotations

from ...ir.dtypes import DType
from ...ir.node import Node
from .emitter import ELEMENT_TYPES, Converter, Emitter, Refusal

_DIRECT = {
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "erf": "Erf",
    "relu": "Relu",
    "sub": "Sub",
    "div": "Div",
    "pow": "Pow",
    "logical_and": "And",
    "logical_or": "Or",
    "logical_xor": "Xor",
    "logical_not": "Not",
    "where": "Where",
}
_ROUNDING = {"floor": "Floor", "ceil": "Ceil", "round": "Round"}
_ON_BOOLS = {"add": "Or", "mul": "And", "maximum": "Or", "minimum": "And"}
_ON_NUMBERS = {"add": "Add", "mul": "Mul", "maximum": "Max", "minimum": "Min"}
_COMPARISONS = {
    "eq": "Equal",
    "ne": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}


def _direct(e: Emitter, node: Node, *operands: str) -> str:
    return e.op(_DIRECT[node.op], *operands)


def _rounding(e: Emitter, node: Node, x: str) -> str:
    return e.op(_ROUNDING[node.op] if node.dtype.is_float else "Identity", x)


def _arithmetic(e: Emitter, node: Node, a: str, b: str) -> str:
    table = _ON_BOOLS if node.dtype is DType.BOOL else _ON_NUMBERS
    return e.op(table[node.op], a, b)


def _comparison(e: Emitter, node: Node, a: str, b: str) -> str:
    if node.operands[0].dtype is DType.BOOL and node.op not in ("eq", "ne"):
        a, b = (e.op("Cast", x, to=ELEMENT_TYPES[DType.I32]) for x in (a, b))
    found = e.op(_COMPARISONS[node.op], a, b)
    return e.op("Not", found) if node.op == "ne" else found


def _rsqrt(e: Emitter, node: Node, x: str) -> str:
    return e.op("Reciprocal", e.op("Sqrt", x))


def _sign(e: Emitter, node: Node, x: str) -> str:
    found = e.op("Sign", x)
    if not node.dtype.is_float:
        return found
    return e.op("Where", e.op("IsNaN", x), e.scalar(0.0, node.dtype), found)  # torch: sign(NaN) = 0


def _log1p(e: Emitter, node: Node, x: str) -> str:
    """``x · log(u) / (u - 1)`` with ``u = 1 + x``, which keeps what log(u) alone loses (Kahan)."""
    one = e.scalar(1.0, node.dtype)
    u = e.op("Add", x, one)
    log = e.op("Log", u)
    corrected = e.op("Mul", x, e.op("Div", log, e.op("Sub", u, one)))
    small = e.op("Where", e.op("Equal", u, one), x, corrected)
    return e.op("Where", e.op("Less", x, one), small, log)


def _silu(e: Emitter, node: Node, x: str) -> str:
    return e.op("Mul", x, e.op("Sigmoid", x))


def _gelu(e: Emitter, node: Node, x: str) -> str:
    return e.op("Gelu", x, approximate=node.attr("approximate"))


def _isnan(e: Emitter, node: Node, x: str) -> str:
    if node.operands[0].dtype.is_float:
        return e.op("IsNaN", x)
    return e.op("Not", e.op("Equal", x, x))


def _cast(e: Emitter, node: Node, x: str) -> str:
    return e.op("Cast", x, to=e.shared.types[node.dtype])


def _remainder(e: Emitter, node: Node, a: str, b: str) -> str | Refusal:
    if node.dtype.is_float:
        return _float_remainder(e, node.dtype, a, b)
    return _divisor_may_be_zero(node) or e.op("Mod", a, b)


def _floordiv(e: Emitter, node: Node, a: str, b: str) -> str | Refusal:
    if not node.dtype.is_float:
        rest = _divisor_may_be_zero(node) or e.op("Mod", a, b)
        # Div truncates; after taking the remainder away it is exact.
        return rest if isinstance(rest, Refusal) else e.op("Div", e.op("Sub", a, rest), b)
    rest = _float_remainder(e, node.dtype, a, b)
    whole = e.op("Round", e.op("Div", e.op("Sub", a, rest), b))
    by_zero = e.op("Equal", b, e.scalar(0.0, node.dtype))
    return e.op("Where", by_zero, e.op("Div", a, b), whole)


def _divisor_may_be_zero(node: Node) -> Refusal | None:
    divisor = node.operands[1]
    if divisor.op == "dim_value" or (divisor.op == "const" and divisor.attr("value") != 0):
        return None
    # ONNX Runtime kills the process where torch raises.
    return Refusal("an integer divisor that may be 0")


def _float_remainder(e: Emitter, dtype: DType, a: str, b: str) -> str:
    """The remainder with the divisor's sign, from C's with the dividend's."""
    zero = e.scalar(0.0, dtype)
    rest = e.op("Mod", a, b, fmod=1)
    other_sign = e.op("Xor", e.op("Less", rest, zero), e.op("Less", b, zero))
    off = e.op("And", other_sign, e.op("Not", e.op("Equal", rest, zero)))
    return e.op("Where", off, e.op("Add", rest, b), rest)


CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(_DIRECT, _direct),
    **dict.fromkeys(_ROUNDING, _rounding),
    **dict.fromkeys(_ON_NUMBERS, _arithmetic),
    **dict.fromkeys(_COMPARISONS, _comparison),
    "sign": _sign,
    "rsqrt": _rsqrt,
    "log1p": _log1p,
    "silu": _silu,
    "gelu": _gelu,
    "isnan": _isnan,
    "cast": _cast,
    "remainder": _remainder,
    "floordiv": _floordiv,
}
