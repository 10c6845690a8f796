"""Symbolic sizes: integer polynomials over named symbols, with a closed grammar.

A size is an ``int`` or a ``Dim``. A ``Dim`` is a sum of integer multiples of products of atoms; an
atom is a symbol (``T``) or a call ``floordiv | mod | min | max`` of sizes. Equal polynomials are
equal by value, so ``2*T + T == 3*T``. Symbols stand for non-negative integers; divisors for
positive ones. Division by a constant is normalised: ``(5*T + 7) // 4 == T + (T + 3) // 4 + 1``.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import TypeAlias

from ..errors import GraphError
from .dtypes import DTYPE_NAMES

Size: TypeAlias = "int | Dim"


@dataclass(frozen=True, slots=True)
class Call:
    """An atom that is no polynomial: ``floordiv``, ``mod``, ``min`` or ``max`` of two sizes."""

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
# Names that mean something else where a size may stand in graph text.
RESERVED_NAMES = frozenset({*DTYPE_NAMES, "inf", "nan", *keyword.kwlist})


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
        return call("floordiv", self, other)

    def __mod__(self, other: Size) -> Size:
        return call("mod", self, other)

    def __rfloordiv__(self, other: int) -> Size:
        return call("floordiv", other, self)

    def __rmod__(self, other: int) -> Size:
        return call("mod", other, self)

    def __str__(self) -> str:
        return " + ".join(_term_text(m, c) for m, c in self.terms).replace("+ -", "- ")

    __repr__ = __str__


def symbol(name: str) -> Dim:
    """The size called ``name``; GraphError when graph text could not hold that name."""
    if not is_name(name):
        raise GraphError(
            f"symbol {name!r}",
            expected="an ASCII identifier that is neither a keyword nor an element type",
            found=name,
            remedy="Rename the symbol.",
        )
    return Dim((((name,), 1),))


def is_name(text: str) -> bool:
    """Whether graph text can hold ``text`` as a name. ASCII, since Python normalises the rest."""
    return text.isascii() and text.isidentifier() and text not in RESERVED_NAMES


def call(name: str, a: Size, b: Size) -> Size:
    """``floordiv``, ``mod``, ``min`` or ``max`` in normal form; GraphError for a divisor 0."""
    if name in ("min", "max"):
        return _extremum(name, a, b)
    if b == 0:
        raise _zero(f"{a}")
    if isinstance(a, int) and isinstance(b, int):
        return _FUNCTIONS[name](a, b)
    quotient = divide(a, b)
    if quotient is not None:
        return quotient if name == "floordiv" else 0
    if isinstance(b, int):
        return _by_constant(name, a, b)
    return _atom(name, a, b)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` where the division is exact for all values of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    divisor = _terms(b)
    if not divisor:
        return None
    factors, scale = divisor[0]
    quotient: Size = 0
    rest = a
    # Long division by the leading term: an exact one has no more steps than this.
    for _ in range(len(_terms(a)) * len(divisor) + 1):
        if rest == 0:
            return quotient
        head, coefficient = _terms(rest)[0]
        left = _remove(head, factors)
        if left is None or coefficient % scale:
            return None
        step = _make({left: coefficient // scale})
        quotient, rest = quotient + step, rest - step * b
    return None


def is_nonnegative(size: Size) -> bool:
    """Whether a size is provably at least 0 for all values of its symbols. False says nothing."""
    return all(c >= 0 and all(map(_atom_nonnegative, m)) for m, c in _terms(size))


def solve(size: Size, value: int) -> tuple[str, int] | None:
    """The symbol ``x`` of a size ``a*x + b``, and where it is ``value``; None for other sizes."""
    name = sole_symbol(size)
    if name is None:
        return None
    offset = evaluate(size, {name: 0})
    scale = evaluate(size, {name: 1}) - offset
    x, rest = divmod(value - offset, scale)
    return None if rest or x < 0 else (name, x)


def sole_symbol(size: Size) -> str | None:
    """The symbol ``x`` of a size ``a*x + b``, which a tensor's shape can bind; None for others."""
    terms = [m for m, _ in _terms(size) if m]
    if len(terms) != 1 or len(terms[0]) != 1 or not isinstance(terms[0][0], str):
        return None
    return terms[0][0]


def name_of(size: Size) -> str | None:
    """The name of the symbol that a size is; None for other sizes."""
    if isinstance(size, int) or len(size.terms) != 1:
        return None
    ((monomial, coefficient),) = size.terms
    if coefficient != 1 or len(monomial) != 1 or not isinstance(monomial[0], str):
        return None
    return monomial[0]


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes, 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def total(sizes: Iterable[Size]) -> Size:
    """The sum of sizes, 0 for none."""
    result: Size = 0
    for size in sizes:
        result = result + size
    return result


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
                term = term * call(atom.name, a, b)
        total = total + term
    return total


def parse_size(text: str) -> Size:
    """Reads a size back from its text; GraphError when it is none."""
    try:
        return size_from_ast(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _bad(text) from error


def size_from_ast(tree: ast.expr) -> Size:
    """Reads a size from a syntax tree of the closed grammar; GraphError for any other."""
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


_OPERATORS: dict[type[ast.operator], Callable[[Size, Size], Size]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: call("floordiv", a, b),
    ast.Mod: lambda a, b: call("mod", a, b),
}


def _bad(text: str) -> GraphError:
    return GraphError(
        f"size {text!r}",
        expected="an integer expression of names with + - * // % min max",
        found="something else",
        remedy="Correct the text.",
    )


def _zero(dividend: str) -> GraphError:
    return GraphError(
        f"size ({dividend}) / 0",
        expected="a divisor that is not 0",
        found="0",
        remedy="Correct the expression.",
    )


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(size, Dim):
        return size.terms
    if not isinstance(size, int):
        raise TypeError(f"a size is an int or a Dim, not {type(size).__name__}")
    return (((), int(size)),) if size else ()


def _atom(name: str, a: Size, b: Size) -> Dim:
    return Dim((((Call(name, (a, b)),), 1),))


def _extremum(name: str, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return _FUNCTIONS[name](a, b)
    if is_nonnegative(b - a):
        return a if name == "min" else b
    if is_nonnegative(a - b):
        return b if name == "min" else a
    first, second = sorted((a, b), key=str)
    return _atom(name, first, second)


def _by_constant(name: str, a: Size, b: int) -> Size:
    """``a // b`` or ``a % b`` with what is divisible taken out, so that equal ones look equal."""
    if b < 0:
        result = _by_constant(name, -a, -b)
        return result if name == "floordiv" else -result
    whole = _make({m: c // b for m, c in _terms(a)})
    rest = _make({m: c % b for m, c in _terms(a)})
    if isinstance(rest, int):
        return whole if name == "floordiv" else rest
    # (g*x + r) / (g*c) = (x + r // g) / c: common factors of the coefficients cancel.
    factor = gcd(b, *(c for m, c in rest.terms if m))
    offset = dict(rest.terms).get((), 0)
    rest = _make({m: c // factor for m, c in rest.terms})
    atom = _atom(name, rest, b // factor)
    return whole + atom if name == "floordiv" else atom * factor + offset % factor


def _atom_nonnegative(atom: Atom) -> bool:
    if isinstance(atom, str):
        return True
    a, b = map(is_nonnegative, atom.args)
    if atom.name == "mod":
        return b
    return (a or b) if atom.name == "max" else (a and b)


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
            if b == 0 and atom.name in _INFIX:
                raise _zero(str(atom.args[0]))
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
