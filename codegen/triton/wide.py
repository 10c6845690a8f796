"""A product of many tokens and the gate behind it as one kernel, in a Program that takes any step.

Such a Program's products are the library's, and what stands behind them is generated. From
``FEWEST`` tokens on a gated MLP's first product and its gate are one kernel of ours, which writes
nothing in between (kernels/wide_linear.py)::

    linear_2 = linear(x, gate_up)             guard: 511 - T      the library
    fused_4 = gated(linear_2)                 guard: 511 - T      a generated kernel
    fused_4 = linear_gated(x, gate_up)        guard: T - 512
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ir.build import input_node, make
from ...ir.dims import Dim, Size
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.ops.control import body_of
from ...targets import Target
from .kernels.linear_tiles import Problem
from .kernels.wide_linear import FEWEST, fills, takes_wide


@dataclass(frozen=True, slots=True)
class Wide:
    """A product that a kernel computes with the gate behind it.

    Attributes:
        linear: the product by itself.
        gate: what reads it, alone.
        problem: both as one.
        guard: where the kernel computes them; otherwise: where the calls of both do.
    """

    linear: Node
    gate: Node
    problem: Problem
    guard: tuple[Size, ...]
    otherwise: tuple[Size, ...]


def find_wide(graph: Graph, target: Target) -> Mapping[Node, Wide]:
    """By product, and by gate, those of a graph that the kernel takes."""
    found: dict[Node, Wide] = {}
    users = graph.users
    for gate in graph.nodes:
        wide = _of(gate, target)
        if wide is None or users[wide.linear] != (gate,) or wide.linear in graph.outputs:
            continue
        found[wide.linear] = found[gate] = wide
    return found


def _of(gate: Node, target: Target) -> Wide | None:
    if gate.op != "fused" or gate.attr("kind") != "elementwise" or len(gate.args) != 1:
        return None
    (linear,) = gate.operands
    tokens = linear.shape[0] if linear.op == "linear" else None
    if not isinstance(tokens, Dim) or linear.args[2] is not None:
        return None
    problem = Problem.located(_joined(linear, gate))
    if problem is None or not takes_wide(problem, target) or not fills(problem, target):
        return None
    return Wide(linear, gate, problem, (tokens - FEWEST,), ((FEWEST - 1) - tokens,))


def _joined(linear: Node, gate: Node) -> Node:
    """Both as one ``fused`` node of kind "linear"."""
    body, (x, weight) = body_of(gate), linear.operands
    inputs = input_node("x", x.type), input_node("weight", weight.type)
    values: dict[Node, Node] = {body.inputs[0]: make("linear", *inputs, None)}
    for node in body.nodes:
        if node not in values:
            args = [None if arg is None else values[arg] for arg in node.args]
            values[node] = make(node.op, *args, **dict(node.attrs))
    result = values[body.outputs[0]]
    joined = replace(Graph("body", inputs, (result,)), name=f"linear_{body.name}")
    return make("fused", x, weight, body=joined, kind="linear")
