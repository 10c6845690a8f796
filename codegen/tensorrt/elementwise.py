"""Elementwise ops, activations and reductions as layers."""

from __future__ import annotations

from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from .writer import Converter, Refusal, Writer

_UNARY = {
    "neg": "neg",
    "abs": "abs",
    "exp": "exp",
    "log": "log",
    "sqrt": "sqrt",
    "reciprocal": "recip",
    "sin": "sin",
    "cos": "cos",
    "erf": "erf",
    "floor": "floor",
    "ceil": "ceil",
    "logical_not": "not",
}
_ACTIVATIONS = {"tanh": "tanh", "sigmoid": "sigmoid", "relu": "relu"}
_BINARY = {
    "add": "sum",
    "sub": "sub",
    "mul": "prod",
    "div": "div",
    "pow": "pow",
    "maximum": "max",
    "minimum": "min",
    "eq": "equal",
    "gt": "greater",
    "lt": "less",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
}
_NEGATED = {"ne": "equal", "ge": "less", "le": "greater"}
_REDUCTIONS = {"sum": "sum", "mean": "avg", "amax": "max", "amin": "min"}


def _operand(w: Writer, node: Node) -> str:
    return w.operand(node.operands[0], node.operands[0].type.rank + 1)


def _unary(w: Writer, node: Node) -> str:
    return w.add("unary", _operand(w, node), op=_UNARY[node.op])


def _activation(w: Writer, node: Node) -> str:
    return w.add("activation", _operand(w, node), op=_ACTIVATIONS[node.op])


def _pair(w: Writer, node: Node) -> tuple[str, str] | Refusal:
    """Both operands at the rank that the result has."""
    rank = node.type.rank
    if any(not is_constant(o) and o.type.rank != rank for o in node.operands):
        return Refusal("operands of several ranks")
    a, b = (*node.operands, *node.operands)[:2]
    return w.operand(a, rank + 1), w.operand(b, rank + 1)


def _binary(w: Writer, node: Node) -> str | Refusal:
    if node.operands[0].dtype is DType.BOOL and node.op in ("add", "mul", "maximum", "minimum"):
        return Refusal("arithmetic on bools")
    pair = _pair(w, node)
    return pair if isinstance(pair, Refusal) else w.add("elementwise", *pair, op=_BINARY[node.op])


def _negated(w: Writer, node: Node) -> str | Refusal:
    pair = _pair(w, node)
    if isinstance(pair, Refusal):
        return pair
    return w.add("unary", w.add("elementwise", *pair, op=_NEGATED[node.op]), op="not")


def _rsqrt(w: Writer, node: Node) -> str:
    return w.add("unary", w.add("unary", _operand(w, node), op="sqrt"), op="recip")


def _silu(w: Writer, node: Node) -> str:
    return activate(w, "silu", _operand(w, node), node.dtype)


def _gelu(w: Writer, node: Node) -> str:
    tanh = node.attr("approximate") == "tanh"
    return activate(w, "gelu_tanh" if tanh else "gelu", _operand(w, node), node.dtype)


def activate(w: Writer, activation: str, x: str, dtype: DType) -> str:
    """One of the IR's activations by name, of values of ``dtype``, rounded once."""
    if activation == "silu":
        wide = w.wide(x, dtype)
        sigmoid = w.add("activation", wide, op="sigmoid")
        return w.narrow(w.add("elementwise", wide, sigmoid, op="prod"), dtype)
    return w.add("activation", x, op={"gelu": "gelu_erf"}.get(activation, activation))


def _cast(w: Writer, node: Node) -> str:
    return w.add("cast", _operand(w, node), dtype=node.dtype)


def _where(w: Writer, node: Node) -> str | Refusal:
    rank = node.type.rank
    if any(not is_constant(o) and o.type.rank != rank for o in node.operands):
        return Refusal("operands of several ranks")
    return w.add("select", *(w.operand(o, rank + 1) for o in node.operands))


def _reduce(w: Writer, node: Node) -> str | Refusal:
    dims = node.attr("dims")
    axes = tuple(int(str(dim)) + 1 for dim in dims) if isinstance(dims, tuple) else (1,)
    if 1 in axes or not node.operands[0].dtype.is_float or not node.attr("keepdim"):
        return Refusal("sums over tokens, of integers or without their dimension")
    x = w.wide(_operand(w, node), node.operands[0].dtype)
    return w.narrow(w.add("reduce", x, op=_REDUCTIONS[node.op], axes=axes), node.dtype)


def _softmax(w: Writer, node: Node) -> str | Refusal:
    dim = node.attr("dim")
    assert isinstance(dim, int)
    if dim == 0:
        return Refusal("softmax over tokens")
    return w.add("softmax", _operand(w, node), axis=dim + 1)


CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_NEGATED, _negated),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "rsqrt": _rsqrt,
    "silu": _silu,
    "gelu": _gelu,
    "cast": _cast,
    "where": _where,
    "softmax": _softmax,
}
