"""Gated activations (Shazeer, 2002.05202): SwiGLU, GeGLU and their kin."""

from __future__ import annotations

from ..ir.build import make
from ..ir.graph import Graph
from ..ir.node import Node
from .base import Pass
from .match import steps_round
from .rewrite import Context, Rule, rewrite

_ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid")


def gate_and_up(node: Node, context: Context) -> Node | None:
    """``mul(silu(gate), up) → gated(gate, up, activation="silu")``, ``stepwise`` in 16 bits."""
    for active, up in (node.operands, node.operands[::-1]):
        if active.op not in _ACTIVATIONS or not context.single_use(active):
            continue
        gate = active.operands[0]
        if up not in (gate, active) and gate.type == up.type:
            tanh = active.attr("approximate") == "tanh"
            name = "gelu_tanh" if tanh else active.op
            return make("gated", gate, up, activation=name, stepwise=steps_round(node))
    return None


GATED_RULES: tuple[Rule, ...] = (Rule("gate_and_up", ("mul",), gate_and_up),)


def recognize_gated(graph: Graph) -> Graph:
    """Finds gated activations.

    Before::

        silu_0: f32[S, 96] = silu(gate)
        mul_0: f32[S, 96] = mul(silu_0, up)

    After::

        gated_0: f32[S, 96] = gated(gate, up, activation='silu')
    """
    return rewrite(graph, GATED_RULES)


RECOGNIZE_GATED = Pass("recognize_gated", recognize_gated)
