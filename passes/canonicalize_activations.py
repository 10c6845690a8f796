"""Activations spelled out in arithmetic: silu, and gelu in its exact and its tanh form
(Hendrycks & Gimpel, 1606.08415).
"""

from __future__ import annotations

import math

from ..ir.build import make
from ..ir.node import Node
from .match import P, any_node, equation, number
from .polynomial import is_polynomial, polynomial
from .rewrite import Context, Rule

X = any_node("x")
ERF_SCALE = math.sqrt(0.5)
TANH_SCALE = math.sqrt(2 / math.pi)
TANH_CUBE = 0.044715


def spelled_gelu(node: Node, context: Context) -> Node | None:
    """``x/2 · (1 + erf(x/√2)) → gelu(x)``;
    ``x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³))) → gelu(x, "tanh")``."""
    gate = _find_gate(node, 4)
    if gate is None:
        return None
    found = polynomial(node)
    for x in {v for m in found or {} for v in m if v is not gate}:
        if x.type == node.type and is_polynomial(found, {(x,): 0.5, (x, gate): 0.5}, node.dtype):
            return _gelu(x, gate)
    return None


def _gelu(x: Node, gate: Node) -> Node | None:
    inside = polynomial(gate.operands[0])
    if gate.op == "erf" and is_polynomial(inside, {(x,): ERF_SCALE}, x.dtype):
        return make("gelu", x, approximate="none")
    cubic = {(x,): TANH_SCALE, (x, x, x): TANH_SCALE * TANH_CUBE}
    if gate.op == "tanh" and is_polynomial(inside, cubic, x.dtype):
        return make("gelu", x, approximate="tanh")
    return None


def _find_gate(node: Node, depth: int) -> Node | None:
    if node.op in ("erf", "tanh"):
        return node
    if depth == 0 or node.op not in ("add", "mul"):
        return None
    gates = (_find_gate(operand, depth - 1) for operand in node.operands)
    return next((gate for gate in gates if gate is not None), None)


ACTIVATION_RULES: tuple[Rule, ...] = (
    equation("silu", P.mul(X, P.sigmoid(X)), lambda x: make("silu", x)),
    equation(
        "silu_by_exp",
        P.div(X, P.add(P.exp(P.neg(X)), number(1))),
        lambda x: make("silu", x) if x.dtype.is_float else None,
    ),
    equation(
        "sigmoid_by_exp",
        P.reciprocal(P.add(P.exp(P.neg(X)), number(1))),
        lambda x: make("sigmoid", x),
    ),
    equation("relu_by_maximum", P.maximum(X, number(0)), lambda x: make("relu", x)),
    Rule("spelled_gelu", ("mul", "add"), spelled_gelu),
)
