"""Symbolic sizes: integer polynomials over named symbols, with a closed grammar.

A size is an ``int`` or a ``Dim``. A ``Dim`` is a sum of integer multiples of products of atoms; an atom is a
symbol (``T``) or a call ``floordiv | mod | min | max`` of sizes. Equal polynomials are equal objects by value, so
``2*T + T == 3*T``. Symbols stand for non-negative integers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

from ..errors import GraphError

Size: TypeAlias = "int | Dim"


@dataclass(frozen=True, slots=True)
class Call:
    """An atom that is not polynomial: ``floordiv(a, b)``, ``mod(a, b)``, ``min(a, b)``, ``max(a, b)``."""

    name: str
    args: tuple[Size, Size]

    def __str__(self) -> str:
        a, b = self.args
        if self.name in _INFIX:
            return f"{_wrap(a)} {_INFIX[self.name]} {_wrap(b)}"
        return f"{self.name}({a}, {b})"


Atom: TypeAlias = "str | Call"
Monomial: TypeAlias = tuple[Atom, ...]
_INFIX = {"floordiv": "//", "mod": "%"}
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
}


@dataclass(frozen=True, slots=True)
class Dim:
    """A non-constant polynomial. Build it with ``symbol`` and arithmetic, never directly."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Size) -> Size:
        total = dict(self.terms)
        for monomial, coefficient in _terms(other):
            total[monomial] = total.get(monomial, 0) + coefficient
        return _make(total)

    def __mul__(self, other: Size) -> Size:
        total: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in _terms(other):
                monomial = tuple(sorted(left + right, key=str))
                total[monomial] = total.get(monomial, 0) + a * b
        return _make(total)

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    def __rsub__(self, other: int) -> Size:
        return self * -1 + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        quotient = divide(self, other)
        return quotient if quotient is not None else call("floordiv", self, other)

    def __mod__(self, other: Size) -> Size:
        return 0 if divide(self, other) is not None else call("mod", self, other)

    def __rfloordiv__(self, other: int) -> Size:
        return call("floordiv", other, self)

    def __rmod__(self, other: int) -> Size:
        return call("mod", other, self)

    def __str__(self) -> str:
        return " + ".join(_term_text(m, c) for m, c in self.terms).replace("+ -", "- ")

    __repr__ = __str__


def symbol(name: str) -> Dim:
    """The size called ``name``."""
    return Dim((((name,), 1),))


def call(name: str, a: Size, b: Size) -> Size:
    """``floordiv``, ``mod``, ``min`` or ``max`` of two sizes, folded where both are constant."""
    if isinstance(a, int) and isinstance(b, int):
        return _FUNCTIONS[name](a, b)
    if name in ("min", "max") and a == b:
        return a
    return Dim((((Call(name, (a, b)),), 1),))


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` where the division is exact for all values of the symbols, else None."""
    if a == b:
        return 1
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    divisor = _terms(b)
    if len(divisor) != 1:
        return _common_quotient(a, b)
    (factors, scale) = divisor[0]
    quotient: dict[Monomial, int] = {}
    for monomial, coefficient in _terms(a):
        rest = _remove(monomial, factors)
        if rest is None or coefficient % scale:
            return None
        quotient[rest] = coefficient // scale
    return _make(quotient)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes, 1 for none."""
    return reduce(lambda a, b: a * b, sizes, 1)


def symbols_of(size: Size) -> frozenset[str]:
    """The names of the symbols in a size."""
    return frozenset(_symbols(size))


def evaluate(size: Size, bindings: Mapping[str, int]) -> int:
    """The value of a size; GraphError when a symbol is not bound."""
    if isinstance(size, int):
        return size
    return sum(c * _product_of(m, bindings) for m, c in size.terms)


def substitute(size: Size, values: Mapping[str, Size]) -> Size:
    """Replaces symbols by sizes."""
    if isinstance(size, int):
        return size
    total: Size = 0
    for monomial, coefficient in size.terms:
        term: Size = coefficient
        for atom in monomial:
            if isinstance(atom, str):
                term = term * values.get(atom, symbol(atom))
            else:
                a, b = (substitute(arg, values) for arg in atom.args)
                term = term * _apply(atom.name, a, b)
        total = total + term
    return total


def parse_size(text: str) -> Size:
    """Reads a size back from its text; GraphError when it is none."""
    try:
        return size_from_ast(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise _bad(text) from error


def size_from_ast(tree: ast.expr) -> Size:
    """Reads a size from a Python expression tree of the closed grammar; GraphError for any other."""
    match tree:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return size_from_ast(operand) * -1
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            return _OPERATORS[type(operator)](size_from_ast(left), size_from_ast(right))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=[left, right], keywords=[]):
            return call(name, size_from_ast(left), size_from_ast(right))
    raise _bad(ast.unparse(tree))


def _apply(name: str, a: Size, b: Size) -> Size:
    if name == "floordiv":
        return a // b
    return a % b if name == "mod" else call(name, a, b)


_OPERATORS: dict[type[ast.operator], Callable[[Size, Size], Size]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def _bad(text: str) -> GraphError:
    return GraphError(
        f"size {text!r}",
        expected="an integer expression of names with + - * // % min max",
        found="something else",
        remedy="Correct the text.",
    )


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Dim) else (((), size),) if size else ()


def _make(total: Mapping[Monomial, int]) -> Size:
    terms = [(m, c) for m, c in total.items() if c]
    if not terms:
        return 0
    if len(terms) == 1 and terms[0][0] == ():
        return terms[0][1]
    return Dim(tuple(sorted(terms, key=lambda term: (-len(term[0]), str(term[0])))))


def _remove(monomial: Monomial, factors: Monomial) -> Monomial | None:
    rest = list(monomial)
    for factor in factors:
        if factor not in rest:
            return None
        rest.remove(factor)
    return tuple(rest)


def _common_quotient(a: Size, b: Size) -> Size | None:
    """Tries the quotient that the leading terms suggest: (6*T + 6) / (T + 1) = 6."""
    head_a, head_b = _terms(a), _terms(b)
    if not head_a or not head_b:
        return None
    rest = _remove(head_a[0][0], head_b[0][0])
    if rest is None or head_a[0][1] % head_b[0][1]:
        return None
    candidate = _make({rest: head_a[0][1] // head_b[0][1]})
    return candidate if candidate * b == a else None


def _symbols(size: Size) -> Iterator[str]:
    for monomial, _ in _terms(size):
        for atom in monomial:
            if isinstance(atom, str):
                yield atom
            else:
                for arg in atom.args:
                    yield from _symbols(arg)


def _product_of(monomial: Monomial, bindings: Mapping[str, int]) -> int:
    value = 1
    for atom in monomial:
        if isinstance(atom, str):
            value *= _bound(atom, bindings)
        else:
            a, b = (evaluate(arg, bindings) for arg in atom.args)
            value *= _FUNCTIONS[atom.name](a, b)
    return value


def _bound(name: str, bindings: Mapping[str, int]) -> int:
    if name not in bindings:
        raise GraphError(
            f"symbol {name}",
            expected="a value at run time",
            found=f"bindings for {sorted(bindings)} only",
            remedy="Bind it from an input's shape.",
        )
    return bindings[name]


def _wrap(size: Size) -> str:
    text = str(size)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def _term_text(monomial: Monomial, coefficient: int) -> str:
    if not monomial:
        return str(coefficient)
    infix = [isinstance(a, Call) and a.name in _INFIX for a in monomial]
    alone = len(monomial) == 1 and coefficient == 1
    atoms = [str(a) if alone or not i else f"({a})" for a, i in zip(monomial, infix, strict=True)]
    factors = "*".join(atoms)
    return factors if coefficient == 1 else f"{coefficient}*{factors}"
