"""Torch's symbolic numbers as sizes of the IR, and fake tensors as types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import sympy  # type: ignore[import-untyped]
import torch

from ...errors import CaptureError
from ...ir.build import const, make
from ...ir.dims import Call, Dim, Size, call, evaluate, symbol
from ...ir.dtypes import DType
from ...ir.node import Node
from ...ir.types import TensorType
from ..capture_types import Symbol

_PROBES = (7, 11)
_FAR = 1 << 40


@dataclass(frozen=True, slots=True)
class Number:
    """A Python float that depends on sizes: a 0-d f64 node that promotes as Python numbers do."""

    node: Node


@dataclass(frozen=True, slots=True)
class Complex:
    """A complex tensor as its two parts."""

    real: Node
    imag: Node


@dataclass(frozen=True, slots=True)
class Sizes:
    """Reads sizes and types of one capture.

    Attributes:
        names: symbol of torch → name in the IR.
        ranges: name in the IR → (least, greatest or None).
    """

    names: Mapping[str, str]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    @staticmethod
    def of(symbols: Sequence[Symbol]) -> Sizes:
        """Readable names: ``S`` for a single symbol, else ``s0, s1, …`` in order."""
        names = {s.name: "S" if len(symbols) == 1 else f"s{i}" for i, s in enumerate(symbols)}
        return Sizes(names, {names[s.name]: (s.lower, s.upper) for s in symbols})

    def size(self, value: int | torch.SymInt) -> Size:
        """One size; CaptureError when it depends on data or has no counterpart in the IR."""
        return value if isinstance(value, int) else self._convert(value.node.expr)

    def type(self, tensor: torch.Tensor) -> TensorType:
        """Type of a fake tensor; CaptureError for element types that the IR has no name for."""
        try:
            dtype = DType.from_torch(tensor.dtype)
        except KeyError as error:
            raise CaptureError(
                f"tensor of {tensor.dtype}",
                expected=f"an element type among {', '.join(d.value for d in DType)}",
                found=str(tensor.dtype),
                remedy="Cast it in the module.",
            ) from error
        return TensorType(dtype, tuple(self.size(size) for size in tensor.shape))

    def number(self, value: torch.SymFloat) -> Number:
        """A symbolic float as an f64 scalar."""
        return Number(self._float(value.node.expr))

    def never_negative(self, size: Size) -> bool:
        """Whether ``size >= 0`` for all values of the symbols, as far as intervals show it."""
        return _interval(size, self.ranges)[0] >= 0

    def agree(self, a: Iterable[Size], b: Iterable[Size]) -> bool:
        """Whether two shapes are equal, if need be judged by their values at two points."""
        left, right = tuple(a), tuple(b)
        if left == right or len(left) != len(right):
            return left == right
        points = [{n: self._probe(n, p + i) for i, n in enumerate(self.ranges)} for p in _PROBES]
        return all(
            evaluate(x, at) == evaluate(y, at)
            for x, y in zip(left, right, strict=True)
            for at in points
        )

    def extreme(self, name: str, a: Size, b: Size) -> Size:
        """``min`` or ``max`` of two sizes, folded where the symbols' ranges decide it."""
        greater = a if self.never_negative(a - b) else b if self.never_negative(b - a) else None
        if greater is None:
            return call(name, a, b)
        return greater if name == "max" else b if greater is a else a

    def _probe(self, name: str, wish: int) -> int:
        lower, upper = self.ranges[name]
        return max(lower, wish if upper is None else min(wish, upper))

    def _convert(self, expr: sympy.Expr) -> Size:
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            return self._symbol(expr)
        kind = type(expr).__name__
        if kind in _CALLS:
            return reduce(_CALLS[kind], [self._convert(arg) for arg in expr.args])
        if kind in ("Min", "Max"):
            sizes = [self._convert(arg) for arg in expr.args]
            return reduce(lambda a, b: self.extreme(kind.lower(), a, b), sizes)
        if kind == "ModularIndexing":
            base, divisor, modulus = (self._convert(arg) for arg in expr.args)
            return (base // divisor) % modulus
        if kind in ("Pow", "PowByNatural") and expr.args[1].is_Integer and int(expr.args[1]) > 0:
            return reduce(lambda a, b: a * b, [self._convert(expr.args[0])] * int(expr.args[1]))
        raise CaptureError(
            f"size {expr}",
            expected="sums, products, floor divisions, remainders, minima and maxima of sizes",
            found=kind,
            remedy="Compute the size otherwise, or make the dimension static.",
        )

    def _symbol(self, expr: sympy.Symbol) -> Dim:
        if str(expr) in self.names:
            return symbol(self.names[str(expr)])
        raise CaptureError(
            f"size {expr}",
            expected="sizes that follow from the shapes of the inputs",
            found="one that depends on values, as nonzero() and item() make them",
            remedy="Use torch.compile(model, backend='tilewright'), which breaks the graph there, "
            "or write it with torch.where.",
        )

    def _float(self, expr: sympy.Expr) -> Node:
        kind = type(expr).__name__
        if expr.is_Number:
            return const(float(expr), DType.F64)
        if kind in _FLOAT_CALLS:
            return reduce(
                lambda a, b: make(_FLOAT_CALLS[kind], a, b), [self._float(arg) for arg in expr.args]
            )
        if kind.startswith("OpaqueUnaryFn_") and kind.split("_")[1] in _FLOAT_UNARY:
            return make(kind.split("_")[1], self._float(expr.args[0]))
        if kind == "ToFloat":
            expr = expr.args[0]
        size = self._convert(expr)
        if isinstance(size, int):
            return const(float(size), DType.F64)
        return make("dim_value", size=size, dtype=DType.F64)


def _mod(a: Size, b: Size) -> Size:
    return a % b


_CALLS: dict[str, Callable[[Size, Size], Size]] = {
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "FloorDiv": lambda a, b: a // b,
    "CleanDiv": lambda a, b: a // b,
    "Mod": _mod,
    "PythonMod": _mod,
}
_FLOAT_CALLS = {
    "FloatTrueDiv": "div",
    "IntTrueDiv": "div",
    "FloatPow": "pow",
}
_FLOAT_UNARY = frozenset({"sqrt", "exp", "log", "sin", "cos", "tanh"})


def _interval(size: Size, ranges: Mapping[str, tuple[int, int | None]]) -> tuple[int, int]:
    """Bounds of a size; ``_FAR`` and beyond stands for unlimited."""
    if isinstance(size, int):
        return size, size
    least = greatest = 0
    for monomial, coefficient in size.terms:
        low = high = 1
        for atom in monomial:
            corners = [a * b for a in (low, high) for b in _atom_interval(atom, ranges)]
            low, high = min(corners), max(corners)
        ends = (low * coefficient, high * coefficient)
        least, greatest = least + min(ends), greatest + max(ends)
    return least, greatest


def _atom_interval(
    atom: str | Call, ranges: Mapping[str, tuple[int, int | None]]
) -> tuple[int, int]:
    if isinstance(atom, str):
        lower, upper = ranges.get(atom, (0, None))
        return lower, _FAR if upper is None else upper
    (low_a, high_a), (low_b, high_b) = (_interval(arg, ranges) for arg in atom.args)
    match atom.name:
        case "min":
            return min(low_a, low_b), min(high_a, high_b)
        case "max":
            return max(low_a, low_b), max(high_a, high_b)
        case "mod" if low_b > 0:
            return 0, high_b - 1
        case "floordiv" if low_b > 0 and low_a >= 0:
            return low_a // high_b, high_a // low_b
    return -_FAR, _FAR
