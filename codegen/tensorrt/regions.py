"""Which nodes of a graph over slots have layers, and a region of those that do as a network.

Inputs of a network are values of tokens, [batch, length, …], of rows that logits are wanted of,
[rows, …], and caches, [batch, KV heads, cache length, head dim]; results are laid out alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...ir.graph import Graph, input_name
from ...ir.node import Node
from ..constants import is_constant
from ..decoder import Cache, caches_of
from . import attention, elementwise, linears, norms, shapes
from .network import Network, Tensor
from .writer import Converter, Refusal, Writer, leading, sizes_behind

CONVERTERS: dict[str, Converter] = {
    **elementwise.CONVERTERS,
    **shapes.CONVERTERS,
    **norms.CONVERTERS,
    **linears.CONVERTERS,
    **attention.CONVERTERS,
}
"""What becomes layers, by op."""
_OUTSIDE = {"token_ids": "input_ids", "positions": "position_ids"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A region as a network.

    Attributes:
        network: its layers.
        inputs: the value that each input of the network is, in order.
    """

    network: Network
    inputs: tuple[Node, ...]


def refusals(graph: Graph, names: Mapping[Node, str], max_len: int) -> dict[Node, Refusal]:
    """The nodes of a graph over slots that have no form in TensorRT, and why."""
    w = Writer(graph, names, CONVERTERS, max_len)
    _read_inputs(w, graph.inputs)
    refused = {}
    for node in _calls(graph.nodes):
        refusal = w.emit(node)
        if refusal is not None:
            refused[node] = refusal
    return refused


def lower_region(
    graph: Graph,
    nodes: Iterable[Node],
    outputs: Mapping[str, Node],
    names: Mapping[Node, str],
    max_len: int,
) -> Piece:
    """A network of nodes that are not refused.

    Args:
        graph: over slots, that they are of.
        nodes: in order; no path between them leaves them.
        outputs: the values that are wanted, by the network's name of them.
        names: readable names of values.
        max_len: longest sequence in tokens, the length of caches and of tables over positions.
    """
    w = Writer(graph, names, CONVERTERS, max_len)
    for name in outputs:
        w.parts.unique(name)
    calls = list(_calls(nodes))
    given = _read_inputs(w, _outside(graph, calls))
    for node in calls:
        refusal = w.emit(node)
        assert refusal is None, f"{node}: {refusal}"
    found: dict[str, str] = {}
    for name, node in outputs.items():
        value = w.value(node)
        if leading(node) == (1, "rows"):
            value = w.add("shuffle", value, shape=(-1, *sizes_behind(node)))
        while value in given or value in found.values():  # an output is a layer's, and its own
            value = w.add("shuffle", value, shape=(0,) * (node.type.rank + 1))
        found[name] = value
    network = w.parts.network(found)
    return Piece(network, tuple(given[tensor.name] for tensor in network.inputs))


def _calls(nodes: Iterable[Node]) -> Iterable[Node]:
    return (n for n in nodes if n.op not in ("input", "item") and not is_constant(n))


def _outside(graph: Graph, calls: list[Node]) -> list[Node]:
    """What a region may read: positions always (masks and rotations are made from them)."""
    inside = set(calls)
    read = {node for node in graph.inputs if input_name(node) == "positions"}
    for node in calls:
        for operand in node.operands:
            source = operand.operands[0] if operand.op == "item" else operand
            if source not in inside and not is_constant(operand):
                read.add(operand)
    ordered = [node for node in graph.inputs if node in read]
    return ordered + [node for node in graph.nodes if node in read and node.op != "input"]


def _read_inputs(w: Writer, nodes: Iterable[Node]) -> dict[str, Node]:
    """Enters values from outside, by the names of the network's inputs."""
    caches = caches_of(w.graph)
    given: dict[str, Node] = {}
    for node in nodes:
        tensor = _tensor(w, node, caches.get(node))
        if tensor is None:
            continue
        w.parts.inputs.append(tensor)
        given[tensor.name] = node
        name = tensor.name
        if leading(node) == (1, "rows"):
            name = w.add("shuffle", name, shape=(1, -1, *sizes_behind(node)))
        w.values[node] = (name,)
    return given


def _tensor(w: Writer, node: Node, cache: Cache | None) -> Tensor | None:
    """The input that brings a value; None for what lengths of sequences follow from."""
    if cache is not None:
        shape = ("batch", cache.heads, w.max_len, cache.width)
        return Tensor(w.parts.unique(cache.past), cache.dtype, shape)
    first = leading(node)
    if not first:
        return None
    own = input_name(node) if node.op == "input" else w.names.get(node, node.op)
    name = w.parts.unique(_OUTSIDE.get(own, own) if node.op == "input" else own)
    sizes = ("rows",) if first == (1, "rows") else first
    return Tensor(name, node.dtype, (*sizes, *sizes_behind(node)))
