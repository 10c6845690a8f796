"""Complex numbers as pairs of real tensors: rotary embeddings by view_as_complex and polar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.build import make, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ...ir.types import TensorType
from .base import Call, Rule, Value, as_node
from .shape import RULES as SHAPE_RULES
from .shape import concat, take
from .symbols import Complex

_MOVES = (
    *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "t"),
    *("expand", "slice", "select", "repeat", "flip"),
)
_SAME = ("clone", "alias", "contiguous", "detach")
MAKERS = ("aten.view_as_complex", "aten.polar", "aten.complex")


def lower_complex(c: Call) -> Complex | Node | None:
    """A call that makes or takes pairs; None without a rule: then the pairs are materialised."""
    op = c.op.removeprefix("aten.")
    z = c.args.get("self")
    if c.op in MAKERS:
        return _made(c, op)
    if isinstance(z, Complex) and op in _SAME:
        return z
    if isinstance(z, Complex) and op in _MOVES:
        parts = [_moved(SHAPE_RULES[c.op], c, part) for part in (z.real, z.imag)]
        return Complex(parts[0], parts[1]) if parts[0] and parts[1] else None
    if op in ("mul", "add", "sub") and c.args.get("alpha", 1) == 1:
        return _arithmetic(op, z, c.args["other"])
    return _taken(op, z) if isinstance(z, Complex) else None


def materialised(value: Value) -> Value:
    """The value with its pairs as complex tensors."""
    if isinstance(value, list | tuple):
        return [materialised(element) for element in value]
    if not isinstance(value, Complex):
        return value
    wide = DType.C128 if value.real.dtype is DType.F64 else DType.C64
    operands = (("t", 0), ("t", 1))
    result = TensorType(wide, value.real.shape)
    return make(
        "aten",
        *(value.real, value.imag),
        target="aten.complex.default",
        positional=operands,
        named=(),
        types=(result,),
    )


def touches(args: Mapping[str, Value]) -> bool:
    """Whether a pair is among the arguments."""
    flat = [e for v in args.values() for e in (v if isinstance(v, list | tuple) else [v])]
    return any(isinstance(value, Complex) for value in flat)


def _made(c: Call, op: str) -> Complex:
    if op == "polar":
        size, angle = c.tensor("abs"), c.tensor("angle")
        return Complex(*(make("mul", size, make(f, angle)) for f in ("cos", "sin")))
    if op == "complex":
        return Complex(c.tensor("real"), c.tensor("imag"))
    x = c.tensor("self")
    return Complex(take(x, x.type.rank - 1, 0), take(x, x.type.rank - 1, 1))


def _moved(rule: Rule, c: Call, part: Node) -> Node | None:
    moved = rule(replace(c, args={**c.args, "self": part}))
    return moved if isinstance(moved, Node) else None


def _arithmetic(op: str, a: Value, b: Value) -> Complex | None:
    if isinstance(a, Complex) and isinstance(b, Complex):
        if op != "mul":
            return Complex(make(op, a.real, b.real), make(op, a.imag, b.imag))
        real = make("sub", make("mul", a.real, b.real), make("mul", a.imag, b.imag))
        imag = make("add", make("mul", a.real, b.imag), make("mul", a.imag, b.real))
        return Complex(real, imag)
    if isinstance(b, Complex):
        a, b = b, a
    if op != "mul" or not isinstance(a, Complex) or isinstance(b, Node) and not b.dtype.is_float:
        return None
    factor = as_node(b, a.real.dtype)
    return Complex(make("mul", a.real, factor), make("mul", a.imag, factor))


def _taken(op: str, z: Complex) -> Complex | Node | None:
    match op:
        case "view_as_real":
            columns = [reshape(part, *part.shape, 1) for part in (z.real, z.imag)]
            return concat(columns, z.real.type.rank)
        case "real":
            return z.real
        case "imag":
            return z.imag
        case "conj" | "_conj" | "conj_physical":
            return Complex(z.real, make("neg", z.imag))
    return None
