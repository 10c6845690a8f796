"""The inverse of fusion, for backends and tools that want primitive ops."""

from __future__ import annotations

from ..ir.build import make
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from ..ir.ops.control import body_of
from .base import Pass
from .rewrite import rebuild


def inline_fused(graph: Graph) -> Graph:
    """Puts the bodies of ``fused`` nodes in their place, in nested graphs too.

    Before::

        def g(x: f32[T, 8], y: f32[T, 8]):
            def mul_silu_1f0c(a: f32[T, 8], b: f32[T, 8]):
                mul_0: f32[T, 8] = mul(a, b)
                silu_0: f32[T, 8] = silu(mul_0)
                return {"out0": silu_0}
            fused_0: f32[T, 8] = fused(x, y, body=mul_silu_1f0c, kind="elementwise")
            return {"out0": fused_0}

    After::

        def g(x: f32[T, 8], y: f32[T, 8]):
            mul_0: f32[T, 8] = mul(x, y)
            silu_0: f32[T, 8] = silu(mul_0)
            return {"out0": silu_0}

    It undoes ``fuse`` exactly: nodes are interned, so the very same nodes come back.
    """
    values: dict[Node, Node] = {}
    results: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node.op == "fused":
            results[node] = _inlined(node, values)
            values[node] = results[node][0]
        elif node.op == "item" and node.operands[0] in results:
            index = node.attr("index")
            assert isinstance(index, int)
            values[node] = results[node.operands[0]][index]
        else:
            values[node] = _in_bodies(rebuild(node, values))
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))


INLINE_FUSED = Pass("inline-fused", inline_fused)


def _inlined(node: Node, values: dict[Node, Node]) -> tuple[Node, ...]:
    body = body_of(node)
    inner = dict(zip(body.inputs, (values[o] for o in node.operands), strict=True))
    for each in body.nodes:
        if each not in inner:
            inner[each] = rebuild(each, inner)
    return tuple(inner[output] for output in body.outputs)


def _in_bodies(node: Node) -> Node:
    if not any(isinstance(value, Graph) for _, value in node.attrs):
        return node
    attrs: dict[str, Attr] = {
        name: inline_fused(value) if isinstance(value, Graph) else value
        for name, value in node.attrs
    }
    return make(node.op, *node.args, **attrs)
