"""How each elementwise op reads in a kernel's text, by the type that its values are held in.

16-bit floats are held as float32 that was rounded to them, all other types as themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...ir.dtypes import DType
from ...ir.node import Attr, Node
from .generate_codes import is_by_largest, is_clamped
from .source import PDL

TRITON_NAMES = {
    DType.F64: "tl.float64",
    DType.F32: "tl.float32",
    DType.F16: "tl.float16",
    DType.BF16: "tl.bfloat16",
    DType.F8E4M3: "tl.float8e4nv",
    DType.I64: "tl.int64",
    DType.I32: "tl.int32",
    DType.I16: "tl.int16",
    DType.I8: "tl.int8",
    DType.U8: "tl.uint8",
    DType.BOOL: "tl.int1",
}
"""The element types that kernels compute in."""

_NARROW = frozenset({DType.F16, DType.BF16})
_SMALLEST_NORMAL = 2.0**-126  # Triton takes literals below it for float64
# Their results need no rounding: they are operands, or small integers.
_EXACT = frozenset(
    ["neg", "abs", "relu", "maximum", "minimum", "floor", "ceil", "round", "sign", "where"]
)
_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "logical_and": "&",
    "logical_or": "|",
    "logical_xor": "^",
}
_BOOL_INFIX = {"add": "|", "mul": "&", "maximum": "|", "minimum": "&"}
_ORDERED = frozenset({"lt", "le", "gt", "ge"})
_COMPARED = frozenset({"eq", "ne", "isnan"}) | _ORDERED
_PLAIN = frozenset(_INFIX) | {"where", "maximum", "minimum", "div"}  # take Python's literals
_PROPAGATE = ", propagate_nan=tl.PropagateNan.ALL"
# {0}, {1}: operands; {t}: the type they are held in; {n}: whether native exponentials do.
_FLOATS = {
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "exp": "_exp({0}, {n})",
    "log": "tl.log({0})",
    "log1p": "_log1p({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    "reciprocal": "tl.div_rn(1.0, {0})",
    "sin": "_sin({0})",
    "cos": "_cos({0})",
    "tanh": "_tanh({0}, {n})",
    "sigmoid": "_sigmoid({0}, {n})",
    "erf": "tl.erf({0})",
    "relu": "_relu({0})",
    "silu": "_silu({0}, {n})",
    "gelu": "_gelu({0})",
    "gelu_tanh": "_gelu_tanh({0}, {n})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "round": "_round({0})",
    "sign": "({0} > 0.0).to({t}) - ({0} < 0.0).to({t})",
    "div": "tl.div_rn({0}, {1})",
    "pow": "_pow({0}, {1}).to({t})",
    "maximum": f"tl.maximum({{0}}, {{1}}{_PROPAGATE})",
    "minimum": f"tl.minimum({{0}}, {{1}}{_PROPAGATE})",
    "floordiv": "_floor_divide({0}, {1})",
    "remainder": "_remainder({0}, {1})",
    "isnan": "{0} != {0}",
}
_DOUBLES = {
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "1.0 / tl.sqrt({0})",
    "reciprocal": "1.0 / {0}",
    "div": "{0} / {1}",
}
_INTEGERS = {
    "neg": "{0} * 0 - {0}",
    "abs": "tl.abs({0})",
    "relu": "tl.maximum({0}, {0} * 0)",
    "floor": "{0}",
    "ceil": "{0}",
    "round": "{0}",
    "sign": "({0} > 0).to({t}) - ({0} < 0).to({t})",
    "pow": "_int_pow({0}, {1})",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "floordiv": "_int_floor_divide({0}, {1})",
    "remainder": "_int_remainder({0}, {1})",
}


def held(dtype: DType) -> str:
    """The Triton type that values of ``dtype`` are held in."""
    return "tl.float32" if dtype in _NARROW else TRITON_NAMES[dtype]


def native(dtype: DType) -> bool:
    """Whether the device's own exponential and division do for results of ``dtype``."""
    return dtype is not DType.F32


def rounded(text: str, dtype: DType) -> str:
    """A held value of any digits as one that ``dtype`` has."""
    if dtype not in _NARROW:
        return text
    text = text if text.isidentifier() else f"({text})"
    return f"{text}.to({TRITON_NAMES[dtype]}).to(tl.float32)"


def elementwise(node: Node, args: Sequence[str]) -> str | None:
    """The text of an elementwise node (gated included), given its operands' names or literals, as
    `operand` has them; None for an op that kernels lack.
    """
    if node.op == "cast":
        if node.dtype is DType.F8E4M3 and is_clamped(node.operands[0]):
            return f"{args[0]}.to({held(node.dtype)})"
        return _cast(args[0], node.operands[0].dtype, node.dtype)
    if is_by_largest(node):
        return f"_by_largest({args[0]}, {args[1]}, {PDL})"
    if node.op == "gated":
        gate = activation(str(node.attr("activation")), args[0], node.dtype)
        if node.attr("stepwise"):
            gate = rounded(gate, node.dtype)
        return rounded(f"{gate} * {args[1]}", node.dtype)
    text = _text(node, args)
    return text if text is None or node.op in _EXACT else rounded(text, node.dtype)


def operand(node: Node, const: Node) -> str:
    """A constant operand of ``node``, as text."""
    alone = all(other.op == "const" for other in node.operands)
    return constant_of(const, plain=node.op in _PLAIN and not alone)


def constant_of(const: Node, *, plain: bool = False) -> str:
    """A ``const`` node as text, as ``constant`` has it."""
    value = const.attr("value")
    assert isinstance(value, int | float)
    return constant(value, const.dtype, plain=plain)


def constant(value: float, dtype: DType, *, plain: bool = False) -> str:
    """A constant as ``dtype`` has it; ``plain`` for a literal where Triton reads it rightly."""
    exact = float(torch.tensor(value, dtype=dtype.torch).item()) if dtype.is_float else value
    if dtype is DType.F32 and math.isfinite(exact):
        exact = value  # its digits are fewer, and Triton rounds in the same way
    text = repr(exact) if math.isfinite(exact) else f'float("{exact}")'
    size = abs(exact)
    usual = size == 0 or size >= _SMALLEST_NORMAL or size != size
    if plain and held(dtype) == "tl.float32" and usual:
        return text
    return f"tl.full([1, 1], {text}, {held(dtype)})"


def activation(name: str, x: str, dtype: DType) -> str:
    """A gated activation of a held value, unrounded."""
    return _FLOATS[name].format(x, n=native(dtype), t=held(dtype))


def exponential(x: str, dtype: DType) -> str:
    """``e`` to a held value, as good as results of ``dtype`` show."""
    return f"_exp({x}, {native(dtype)})"


def quotient(a: str, b: str, dtype: DType) -> str:
    """A quotient of held values, rounded to nearest."""
    return f"{a} / {b}" if dtype is DType.F64 else f"tl.div_rn({a}, {b})"


def _text(node: Node, args: Sequence[str]) -> str | None:
    dtype = node.operands[-1].dtype
    if node.op == "where":
        return f"tl.where({', '.join(args)})"
    if node.op == "logical_not":
        return f"{args[0]} == 0"
    if dtype is DType.BOOL:
        return _of_bools(node.op, args)
    if node.op in _INFIX:
        return f" {_INFIX[node.op]} ".join(args)
    name = "gelu_tanh" if node.op == "gelu" and node.attr("approximate") == "tanh" else node.op
    table = _FLOATS if dtype.is_float else _INTEGERS
    if dtype is DType.F64:
        table = {**_FLOATS, **_DOUBLES}
        if node.op in ("floordiv", "remainder"):
            return None
    pattern = table.get(name)
    return pattern and pattern.format(*args, t=held(dtype), n=native(dtype))


def _of_bools(op: str, args: Sequence[str]) -> str | None:
    if op in _ORDERED:
        return f" {_INFIX[op]} ".join(f"{arg}.to(tl.int32)" for arg in args)
    symbol = _BOOL_INFIX.get(op) or _INFIX.get(op)
    return symbol and f" {symbol} ".join(args)


def _cast(x: str, source: DType, target: DType) -> str:
    if target is DType.BOOL:
        return x if source is DType.BOOL else f"{x} != 0"
    if target in _NARROW:
        x = x if held(source) == "tl.float32" else f"{x}.to(tl.float32)"
        return rounded(x, target)
    if target is DType.F8E4M3:  # devices saturate, torch does not
        return f'tl.where(tl.abs({x}) > 464.0, float("nan"), {x}).to({held(target)})'
    if source.is_float and target in (DType.I8, DType.I16, DType.U8):
        x = f"{x}.to(tl.int32)"  # out of range it wraps, as on CPUs
    return x if held(source) == held(target) else f"{x}.to({held(target)})"


def attr_float(value: Attr) -> float:
    """A float attribute."""
    assert isinstance(value, int | float)
    return float(value)
