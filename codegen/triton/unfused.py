"""A fused product as calls of its own: its norm, a library's product, and what stands behind it.

They are what the graph would hold if nothing were fused into products::

    fused_4 = rms_norm_linear_gated(x, w, gate_up)

    fused_4.normed = rms_norm(x, w)                       # a generated kernel
    fused_4.product = linear(fused_4.normed, gate_up)     # the library
    fused_4 = gated(fused_4.product)                      # a generated kernel

Values between them are rounded to the types that the body declares, which a template need not do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ir.build import input_node, make
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.ops.control import body_of
from ...ir.printer import value_names
from ...targets import Target
from ..lowering import Buffers
from .generate import emit_fused
from .generate_space import BODY_VIEWS
from .layout import located
from .library import takes


@dataclass(frozen=True, slots=True)
class Unfused:
    """A ``fused`` node of kind "linear" as nodes by themselves.

    Attributes:
        node: it.
        parts: (name, node) in order, over the node's operands and one another; the last one's
            result is the node's.
    """

    node: Node
    parts: tuple[tuple[str, Node], ...]

    @classmethod
    def of(cls, node: Node) -> Unfused | None:
        """Those of any node of that kind that is one product; None for others."""
        if node.op != "fused" or node.attr("kind") != "linear":
            return None
        body = body_of(node)
        products = [inner for inner in body.nodes if inner.op == "linear"]
        if len(products) != 1 or len(body.outputs) != 1:
            return None
        (product,), (output,) = products, body.outputs
        values = dict(zip(body.inputs, node.operands, strict=True))
        parts, before = [], product.operands[0]
        if before.op == "rms_norm":
            values[before] = _call(body, before, None, values, "reduction")
            parts.append(("normed", values[before]))
        args = [None if arg is None else values[arg] for arg in product.args]
        values[product] = make("linear", *args, **dict(product.attrs))
        parts.append(("product", values[product]))
        if output is not product:
            parts.append(("result", _call(body, output, product, values, "elementwise")))
        return cls(node, tuple(parts))

    def buffers_of(self, buffers: Buffers) -> dict[Node, str]:
        """The buffer that each part writes; the last one writes the node's own."""
        (own,) = buffers.of(self.node)
        names = {part: f"{own}.{name}" for name, part in self.parts}
        return {**names, self.parts[-1][1]: own}


def unfused(node: Node, target: Target) -> Unfused | None:
    """The parts of a ``fused`` product; None where no library takes the product, or generated
    kernels not the rest.
    """
    found = Unfused.of(node)
    taken = found is not None and all(_is_taken(part, target) for _, part in found.parts)
    return found if taken else None


def _is_taken(part: Node, target: Target) -> bool:
    if part.op != "fused":
        return takes(part)
    layouts = tuple(None if arg is None else located(arg)[1] for arg in part.args)
    return emit_fused(part, layouts, target) is not None


def _call(
    body: Graph, last: Node, known: Node | None, values: Mapping[Node, Node], kind: str
) -> Node:
    """A call of what a body computes from its inputs, and from ``known``, up to ``last``."""
    names = value_names(body)
    inputs: dict[Node, Node] = {}
    made: dict[Node, Node] = {}

    def rebuilt(node: Node) -> Node:
        if node is known or node.op == "input":
            return inputs.setdefault(node, input_node(names[node], node.type))
        if node not in made:
            args = [None if arg is None else rebuilt(arg) for arg in node.args]
            made[node] = make(node.op, *args, **dict(node.attrs))
        return made[node]

    result = rebuilt(last)
    graph = Graph("body", tuple(inputs.values()), (result,))
    ops = dict.fromkeys(n.op for n in made if n.op not in BODY_VIEWS | {"const"})
    # Named as the passes name bodies: what it does, and a hash of how.
    digest = hashlib.sha256(str(graph).encode()).hexdigest()[:4]
    graph = replace(graph, name=f"{'_'.join(ops)}_{digest}")
    return make("fused", *(values[node] for node in inputs), body=graph, kind=kind)
