"""Which nodes of a graph the calls of its Program compute.

Backends name buffers after the graph's values (`Buffers`). Calls that stand for one product
together (codegen/triton/unfused.py) each compute a part of its node.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...codegen.lowering import Buffers
from ...codegen.program import Call, Program
from ...codegen.triton.quant_unfused import separated
from ...ir.graph import Graph
from ...ir.node import Node

# Templates compute such nodes whole; what torch computes of them is the weight.
_OF_PARTS = frozenset({"library", "generated", "eager"})


def nodes_of_calls(graph: Graph, program: Program) -> list[tuple[Node, ...]]:
    """The nodes whose results each call writes, for what it costs: of a call that computes a part
    of a product, that part. Of a call that computes more than it returns, as a session does, the
    last ones.
    """
    maker = _makers(graph)
    parts = {name: part for name, (part, _) in _parts(graph, program, maker).items()}
    in_parts = {**maker, **parts}
    found = [_found(call, in_parts if call.kind in _OF_PARTS else maker) for call in program.calls]
    return _with_whole_graph(program, maker, found)


def _with_whole_graph(
    program: Program, maker: Mapping[str, Node], found: list[tuple[Node, ...]]
) -> list[tuple[Node, ...]]:
    """One launch for all layers computes whatever no other call does."""
    taken = {
        node
        for call, nodes in zip(program.calls, found, strict=True)
        if call.kind != "persistent"
        for node in nodes
    }
    rest = tuple(node for node in dict.fromkeys(maker.values()) if node not in taken)
    return [
        rest if call.kind == "persistent" else nodes
        for call, nodes in zip(program.calls, found, strict=True)
    ]


def owners_of_calls(graph: Graph, program: Program) -> list[tuple[Node, ...]]:
    """As `nodes_of_calls`, for which node of the graph it is that a call is there."""
    maker = _makers(graph)
    owners = {name: owner for name, (_, owner) in _parts(graph, program, maker).items()}
    owned = {**maker, **owners}
    return [_found(call, owned) for call in program.calls]


def _found(call: Call, nodes: Mapping[str, Node]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(nodes[name] for name in call.results if name in nodes))


def _makers(graph: Graph) -> dict[str, Node]:
    buffers = Buffers(graph)
    return {name: node for node in graph.calls() for name in buffers.of(node)}


def _parts(
    graph: Graph, program: Program, maker: Mapping[str, Node]
) -> dict[str, tuple[Node, Node]]:
    """The part that writes a buffer, and the node that it is a part of."""
    written = {name for call in program.calls if call.kind in _OF_PARTS for name in call.results}
    found: dict[str, tuple[Node, Node]] = {}
    buffers = Buffers(graph)
    for name in written & set(maker):
        whole = separated(maker[name])
        if whole is not None:
            parts = whole.buffers_of(buffers)
            found.update((buffer, (part, whole.node)) for part, buffer in parts.items())
    return found
