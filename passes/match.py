"""Patterns over nodes, written like the expressions they match.

    X, EPS = any_node("x"), scalar("eps")
    RMS = P.mul(X, P.rsqrt(P.add(P.mean(P.mul(X, X), keepdim=True), EPS)))
    found = match(RMS, node)          # {"x": Node, "eps": Node} or None

One capture name stands for one node throughout. Commutative ops match in both orders.
Attributes that a pattern names must be equal; others may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from ..ir.build import const, make
from ..ir.dtypes import DType
from ..ir.node import Attr, Node
from ..ir.ops.elementwise import COMMUTATIVE
from .rewrite import Context, Rule

Bindings: TypeAlias = Mapping[str, Node]

# How far a constant may be from the number a formula has, after rounding to its own type.
_CONST_TOLERANCE = {DType.BF16: 1e-2, DType.F16: 2e-3, DType.F32: 1e-6, DType.F64: 1e-6}
_BROADCASTS = ("expand", "reshape")


class Pattern(Protocol):
    """Something that a node can match, in one way, several ways or none."""

    def find(self, node: Node, bound: Bindings) -> Iterator[Bindings]:
        """Yields ``bound`` with this pattern's captures added, once for each way to match."""
        ...


@dataclass(frozen=True, slots=True)
class Capture:
    """Matches what ``inner`` matches (any node without one) and binds it; a bound name matches
    that node alone.
    """

    name: str
    inner: Pattern | None = None

    def find(self, node: Node, bound: Bindings) -> Iterator[Bindings]:
        if self.name in bound:
            if bound[self.name] is node:
                yield bound
        elif self.inner is None:
            yield {**bound, self.name: node}
        else:
            for found in self.inner.find(node, bound):
                yield {**found, self.name: node}


@dataclass(frozen=True, slots=True)
class Test:
    """Matches nodes for which ``holds`` says so, without captures."""

    holds: Callable[[Node], bool]

    def find(self, node: Node, bound: Bindings) -> Iterator[Bindings]:
        if self.holds(node):
            yield bound


@dataclass(frozen=True, slots=True)
class Call:
    """Matches a node of one op, its operands (the absent optional ones left out) and the
    attributes named.
    """

    op: str
    args: tuple[Pattern, ...]
    attrs: tuple[tuple[str, Attr], ...]

    def find(self, node: Node, bound: Bindings) -> Iterator[Bindings]:
        operands = node.operands
        if node.op != self.op or len(operands) != len(self.args):
            return
        if any(node.attr(name) != value for name, value in self.attrs):
            return
        yield from _each(self.args, operands, bound)
        if self.op in COMMUTATIVE and operands[0] is not operands[1]:
            yield from _each(self.args, operands[::-1], bound)


@dataclass(frozen=True, slots=True)
class Either:
    """Matches what any of the patterns matches, earlier ones first."""

    patterns: tuple[Pattern, ...]

    def find(self, node: Node, bound: Bindings) -> Iterator[Bindings]:
        for pattern in self.patterns:
            yield from pattern.find(node, bound)


@dataclass(frozen=True, slots=True)
class Through:
    """Matches ``inner`` on the node, or below unary nodes of ``op`` that lie on top of it."""

    op: str
    inner: Pattern

    def find(self, node: Node, bound: Bindings) -> Iterator[Bindings]:
        yield from self.inner.find(node, bound)
        while node.op == self.op:
            node = node.operands[0]
            yield from self.inner.find(node, bound)


class _Ops:
    """``P.mul(a, b)`` is the pattern of a ``mul`` node."""

    def __getattr__(self, op: str) -> Callable[..., Call]:
        def call(*args: Pattern, **attrs: Attr) -> Call:
            return Call(op, args, tuple(attrs.items()))

        return call


P = _Ops()


def any_node(name: str) -> Capture:
    """Any node, bound to ``name``."""
    return Capture(name)


def scalar(name: str) -> Capture:
    """A scalar constant, broadcast or not, bound to ``name``; read it with ``value_of``."""
    return Capture(name, Test(lambda node: value_of(node) is not None))


def number(value: float) -> Test:
    """A scalar constant of this value, up to the rounding of its type."""
    return Test(lambda node: is_number(node, value))


def maybe_cast(inner: Pattern) -> Through:
    """``inner``, below casts or not."""
    return Through("cast", inner)


def value_of(node: Node) -> float | int | bool | None:
    """The value of a constant whose elements are all equal: a const, reshaped or expanded or
    not; else None.
    """
    while node.op in _BROADCASTS:
        node = node.operands[0]
    value = node.attr("value") if node.op == "const" else None
    return value if isinstance(value, int | float) else None


def is_number(node: Node, value: float) -> bool:
    """Whether ``node`` is a constant of this value, up to the rounding of its element type."""
    found = value_of(node)
    if found is None or found == value:
        return found is not None
    # A tolerance would take bfloat16's 0.996 for 1, and a product with it for nothing.
    dtype = node.dtype.torch
    return torch.tensor(found, dtype=dtype).item() == torch.tensor(value, dtype=dtype).item()


def steps_round(node: Node) -> bool | None:
    """The ``stepwise`` of a formula of several ops in the element type of its result: True where
    each of them rounds, in 16 bits; None in float32, in which kernels compute anyway.
    """
    return True if node.dtype in (DType.BF16, DType.F16) else None


def close(found: float, value: float, dtype: DType) -> bool:
    """Whether two numbers agree as constants of ``dtype``; exactly, for 0, infinities and
    integers.
    """
    if found == value:
        return True
    return math.isclose(found, value, rel_tol=_CONST_TOLERANCE.get(dtype, 0.0))


def match(pattern: Pattern, node: Node) -> Bindings | None:
    """The captures of the first way in which ``node`` matches, None when there is none."""
    return next(pattern.find(node, {}), None)


def equation(name: str, left: Call, right: Callable[..., Node | None]) -> Rule:
    """The rule ``left → right(**captures)``, broadcast to the node's shape; ``right`` declines
    by None.
    """

    def apply(node: Node, context: Context) -> Node | None:
        for bound in left.find(node, {}):
            result = right(**bound)
            if result is not None:
                return fit(result, node)
        return None

    return Rule(name, (left.op,), apply)


def fit(result: Node, node: Node) -> Node:
    """``result`` broadcast to the shape of the ``node`` that it replaces."""
    return result if result.shape == node.shape else make("expand", result, shape=node.shape)


def full(value: float, like: Node) -> Node:
    """A tensor of ``like``'s type with one value throughout."""
    return fit(const(value, like.dtype), like)


def _each(
    patterns: tuple[Pattern, ...], nodes: tuple[Node, ...], bound: Bindings
) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in patterns[0].find(nodes[0], bound):
        yield from _each(patterns[1:], nodes[1:], found)
