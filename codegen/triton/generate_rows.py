"""Ops along the width as steps: norms, softmax, sums, extrema. All compute in the held type, and
round once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ...ir.dims import Size
from ...ir.dtypes import DType
from ...ir.node import Node
from .generate_codes import is_magnitude
from .generate_ops import attr_float, constant, exponential, held, quotient, rounded
from .generate_steps import Reduction, Step


@dataclass(frozen=True, slots=True)
class Value:
    """An operand in the kernel.

    Attributes:
        name: of its variable.
        dtype: of the value.
        cols: whether it varies with the column.
    """

    name: str
    dtype: DType
    cols: bool

    def like(self, dtype: DType) -> str:
        """Its text, in the type that ``dtype`` is held in."""
        same = held(self.dtype) == held(dtype)
        return self.name if same else f"{self.name}.to({held(dtype)})"


def point(name: str, text: str, dtype: DType, of: Iterable[Value | None]) -> tuple[Step, Value]:
    """The step that sets ``name`` to a text over the variables ``of``, and its value."""
    given = [value for value in of if value is not None]
    value = Value(name, dtype, any(v.cols for v in given))
    return Step(name, text, tuple(v.name for v in given), value.cols), value


@dataclass(frozen=True, slots=True)
class Row:
    """What an op along the width knows of its kernel.

    Attributes:
        width: number of columns as text, an integer.
        static: the same as a number, where it is known.
        masked: whether tiles have columns behind the width.
    """

    width: str
    static: Size
    masked: bool

    def count(self, dtype: DType) -> str:
        """The width as a number of the type that ``dtype`` is held in."""
        if isinstance(self.static, int):
            return f"{self.static}.0"
        return f"{self.width}.to({held(dtype)})"

    def reduce(
        self, name: str, kind: Reduction, tile: str, of: tuple[Value, ...], dtype: DType
    ) -> Step:
        """The step that reduces ``tile``, a text over the variables ``of``, along the width."""
        neutral = _neutral(kind, dtype)
        if self.masked:
            tile = f"tl.where(in_cols, {tile}, {constant(neutral, dtype, plain=True)})"
        elif not any(value.cols for value in of):
            tile = f"tl.broadcast_to({tile}, [ROWS, COLUMNS])"
        literal = constant(neutral, dtype).split("], ", 1)[1]
        start = f"tl.full([ROWS, COLUMNS], {literal}"
        uses = tuple(value.name for value in of)
        return Step(name, tile, uses, cols=False, reduction=kind, start=start)


def row_steps(node: Node, name: str, args: tuple[Value | None, ...], row: Row) -> Iterator[Step]:
    """The steps of a norm, softmax or reduction, the last of which is called ``name``."""
    maker = _MAKERS.get(node.op, _extremum)
    yield from maker(node, name, args, row)


Args = tuple[Value | None, ...]


def _rms_norm(node: Node, name: str, args: Args, row: Row) -> Iterator[Step]:
    x, weight = args
    assert x is not None
    yield row.reduce(f"{name}_squares", "sum", f"{x.name} * {x.name}", (x,), node.dtype)
    step, scale = _scale(node, name, row)
    yield step
    text = f"{x.name} * {scale.name}"
    of: tuple[Value, ...] = (x, scale)
    if node.attr("stepwise"):
        step, normed = point(f"{name}_normed", rounded(text, node.dtype), node.dtype, of)
        yield step
        text, of = normed.name, (normed,)
    text += f" * {weight.like(node.dtype)}" if weight else ""
    yield point(name, rounded(text, node.dtype), node.dtype, (*of, weight))[0]


def _layer_norm(node: Node, name: str, args: Args, row: Row) -> Iterator[Step]:
    x, weight, bias = args
    assert x is not None
    yield row.reduce(f"{name}_sum", "sum", x.name, (x,), node.dtype)
    total = Value(f"{name}_sum", node.dtype, False)
    text = f"{total.name} / {row.count(node.dtype)}"
    step, mean = point(f"{name}_mean", text, node.dtype, (total,))
    yield step
    step, centered = point(f"{name}_centered", f"{x.name} - {mean.name}", node.dtype, (x, mean))
    yield step
    square = f"{centered.name} * {centered.name}"
    yield row.reduce(f"{name}_squares", "sum", square, (centered,), node.dtype)
    step, scale = _scale(node, name, row)
    yield step
    text = f"{centered.name} * {scale.name}"
    text += f" * {weight.like(node.dtype)}" if weight else ""
    text += f" + {bias.like(node.dtype)}" if bias else ""
    yield point(name, rounded(text, node.dtype), node.dtype, (centered, scale, weight, bias))[0]


def _softmax(node: Node, name: str, args: Args, row: Row) -> Iterator[Step]:
    (x,) = args
    assert x is not None
    yield row.reduce(f"{name}_max", "max", x.name, (x,), node.dtype)
    most = Value(f"{name}_max", node.dtype, False)
    text = exponential(f"{x.name} - {most.name}", node.dtype)
    step, power = point(f"{name}_exp", text, node.dtype, (x, most))
    yield step
    yield row.reduce(f"{name}_sum", "sum", power.name, (power,), node.dtype)
    total = Value(f"{name}_sum", node.dtype, False)
    text = rounded(quotient(power.name, total.name, node.dtype), node.dtype)
    yield point(name, text, node.dtype, (power, total))[0]


def _total(node: Node, name: str, args: Args, row: Row) -> Iterator[Step]:
    (x,) = args
    assert x is not None
    if node.dtype is DType.BOOL:
        yield from _test(node, name, args, row)
        return
    kind: Reduction = "prod" if node.op == "prod" else "sum"
    yield row.reduce(f"{name}_all", kind, x.name, (x,), node.dtype)
    total = f"{name}_all"
    if node.op == "mean":
        total = quotient(total, row.count(node.dtype), node.dtype)
    yield Step(name, _final(total, node.dtype), (f"{name}_all",), cols=False)


def _test(node: Node, name: str, args: Args, row: Row) -> Iterator[Step]:
    """Whether any, or all, are not 0: sums and products of booleans are that too."""
    (x,) = args
    assert x is not None
    kind: Reduction = "max" if node.op in ("any", "sum", "amax") else "min"
    tile = f"({x.name} != 0).to(tl.int32)"
    yield row.reduce(f"{name}_found", kind, tile, (x,), DType.I32)
    yield Step(name, f"{name}_found != 0", (f"{name}_found",), cols=False)


def _extremum(node: Node, name: str, args: Args, row: Row) -> Iterator[Step]:
    (x,) = args
    assert x is not None
    if node.dtype is DType.BOOL:
        yield from _test(node, name, args, row)
        return
    kind: Reduction = "max" if node.op == "amax" else "min"
    if kind == "max" and is_magnitude(node.operands[0]):
        bits = f"{x.name}.to(tl.int32, bitcast=True)"
        yield row.reduce(f"{name}_bits", kind, bits, (x,), DType.I32)
        text = f"{name}_bits.to(tl.float32, bitcast=True)"
        yield Step(name, text, (f"{name}_bits",), cols=False)
        return
    yield row.reduce(f"{name}_all", kind, x.name, (x,), node.dtype)
    if not node.dtype.is_float:
        yield Step(name, _final(f"{name}_all", node.dtype), (f"{name}_all",), cols=False)
        return
    # Triton's reduction passes over NaN.
    nans = f"({x.name} != {x.name}).to(tl.int32)"
    yield row.reduce(f"{name}_nans", "max", nans, (x,), DType.I32)
    text = f'tl.where({name}_nans > 0, float("nan"), {name}_all)'
    yield Step(name, text, (f"{name}_all", f"{name}_nans"), cols=False)


def _scale(node: Node, name: str, row: Row) -> tuple[Step, Value]:
    squares = Value(f"{name}_squares", node.dtype, False)
    variance = f"{squares.name} / {row.count(node.dtype)} + {attr_float(node.attr('eps'))!r}"
    root = f"1.0 / tl.sqrt({variance})" if node.dtype is DType.F64 else f"tl.rsqrt({variance})"
    return point(f"{name}_scale", root, node.dtype, (squares,))


def _final(text: str, dtype: DType) -> str:
    """Triton sums small integers in wider ones."""
    return f"{text}.to({held(dtype)})" if dtype.is_integer else rounded(text, dtype)


def _neutral(kind: Reduction, dtype: DType) -> float:
    if kind == "sum":
        return 0.0 if dtype.is_float else 0
    if kind == "prod":
        return 1.0 if dtype.is_float else 1
    if dtype.is_float:
        return float("-inf") if kind == "max" else float("inf")
    limits = torch.iinfo(dtype.torch)
    return limits.min if kind == "max" else limits.max


_MAKERS: dict[str, Callable[[Node, str, Args, Row], Iterator[Step]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "sum": _total,
    "mean": _total,
    "prod": _total,
    "any": _test,
    "all": _test,
}
