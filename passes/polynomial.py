"""Expressions as polynomials, so that one formula is recognised in every order of its
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.dtypes import DType
from ..ir.node import Node
from .match import close, value_of

Monomial = tuple[Node, ...]
Polynomial = Mapping[Monomial, float]
MAX_TERMS = 8


def polynomial(node: Node, depth: int = 7) -> Polynomial | None:
    """The coefficients of ``node`` over the values that are not sums and products themselves.

    Monomials are tuples of nodes sorted by identity, () for the constant. None when there are
    more than eight terms.
    ``depth`` bounds how far down it looks: what lies deeper is a variable.
    """
    value = value_of(node)
    if value is not None:
        return {(): float(value)} if value else {}
    if depth == 0 or node.op not in ("add", "sub", "mul", "neg"):
        return {(node,): 1.0}
    parts = [polynomial(operand, depth - 1) for operand in node.operands]
    a, b = parts[0], parts[-1]
    if a is None or b is None:
        return None
    match node.op:
        case "neg":
            return {m: -c for m, c in a.items()}
        case "mul":
            result = _product(a, b)
        case "sub":
            result = _sum(a, {m: -c for m, c in b.items()})
        case _:
            result = _sum(a, b)
    return result if len(result) <= MAX_TERMS else None


def is_polynomial(found: Polynomial | None, wanted: Polynomial, dtype: DType) -> bool:
    """Whether two polynomials agree, up to the rounding of constants in ``dtype``. Keys of
    ``wanted`` in any order.
    """
    if found is None:
        return False
    ordered = {_sorted(m): c for m, c in wanted.items()}
    return found.keys() == ordered.keys() and all(
        close(found[m], ordered[m], dtype) for m in ordered
    )


def _sum(a: Polynomial, b: Polynomial) -> dict[Monomial, float]:
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = total.get(monomial, 0.0) + coefficient
    return {m: c for m, c in total.items() if c}


def _product(a: Polynomial, b: Polynomial) -> dict[Monomial, float]:
    total: dict[Monomial, float] = {}
    for left, x in a.items():
        for right, y in b.items():
            monomial = _sorted(left + right)
            total[monomial] = total.get(monomial, 0.0) + x * y
    return {m: c for m, c in total.items() if c}


def _sorted(monomial: Monomial) -> Monomial:
    return tuple(sorted(monomial, key=id))
