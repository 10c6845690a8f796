"""The rows that logits are wanted of, picked as early as rows stay by themselves: of the last layer
of a decoder all behind its attention is then computed for those rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.build import make
from ..ir.dims import Dim, Size, substitute, symbol, symbols_of
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from ..ir.types import TensorType

T = symbol("T")
_PICKED: Mapping[str, Size] = {"T": symbol("R")}
# Attention asks whose rows they are; an embedding is a pick itself.
_ATTENTION = frozenset({"paged_attention", "scaled_paged_attention", "slot_attention"})
_STAY = _ATTENTION | {"input", "param", "const", "embedding"}
_VIEWS = frozenset({"item", "reshape"})  # of these: nothing is computed, and rows are plain behind


def pick_rows(graph: Graph, pick: Node) -> Graph:
    """Moves a pick of rows, ``index_select(x, wanted, dim=0)``, towards the inputs, past every op
    whose rows nobody else reads.

    Before::

        linear_0: f32[T, 8] = linear(paged_attention_0, o)
        add_0: f32[T, 8] = add(x, linear_0)
        linear_1: f32[T, 16] = linear(add_0, head)
        index_select_0: f32[R, 16] = index_select(linear_1, wanted, dim=0)

    After::

        index_select_0: f32[R, 8] = index_select(x, wanted, dim=0)
        index_select_1: f32[R, 8] = index_select(paged_attention_0, wanted, dim=0)
        linear_0: f32[R, 8] = linear(index_select_1, o)
        add_0: f32[R, 8] = add(index_select_0, linear_0)
        linear_1: f32[R, 16] = linear(add_0, head)

    Args:
        graph: a decoder over ragged tokens: every op but attention acts on each row alone.
        pick: of its nodes; the only one that reads ``wanted``.
    """
    x, wanted = pick.operands
    moved = _behind(graph, pick)
    values: dict[Node, Node] = {}

    def picked(node: Node) -> Node:
        if node not in values and node.types[0].shape[:1] != (T,):
            return node
        if node not in values:
            values[node] = make("index_select", node, wanted, dim=0)
        return values[node]

    for node in graph.nodes:
        if node in moved:
            args = [None if arg is None else picked(arg) for arg in node.args]
            attrs = {name: substituted(value, _PICKED) for name, value in node.attrs}
            values[node] = make(node.op, *args, **attrs)
    result = picked(x)
    return graph.with_outputs(tuple(result if out is pick else out for out in graph.outputs))


def _behind(graph: Graph, pick: Node) -> frozenset[Node]:
    """The nodes whose rows nobody reads but the pick, through others of them."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        readers = graph.users[node]
        alone = bool(readers) and all(reader is pick or reader in found for reader in readers)
        if alone and node not in graph.outputs and _moves(node):
            found.add(node)
    return frozenset(found)


def _moves(node: Node) -> bool:
    """Whether a node makes rows, T of them, of rows and of what no token has a part in."""
    if _stays(node):
        return False
    operands = (type_ for operand in node.operands for type_ in operand.types)
    return all(map(_is_rows, node.types)) and all(_is_rows(t) for t in operands if "T" in t.symbols)


def _stays(node: Node) -> bool:
    return node.op in _STAY or (node.op in _VIEWS and _stays(node.operands[0]))


def _is_rows(type_: TensorType) -> bool:
    return type_.shape[:1] == (T,) and not any("T" in symbols_of(n) for n in type_.shape[1:])


def substituted(value: Attr, known: Mapping[str, Size]) -> Attr:
    """An attribute with its sizes replaced, within tuples too."""
    if isinstance(value, Dim):
        return substitute(value, known)
    if isinstance(value, tuple):
        return tuple(substituted(part, known) for part in value)
    return value
