"""The body of a fused group: a graph of its own, named by what it does and a hash of its structure.

Weights are operands, so the layers of a model share one body, and one kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.build import input_node, make
from ..ir.dims import RESERVED_NAMES
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.schema import schema
from .fuse_groups import inside_order
from .fuse_space import ROW_OPS, is_view

MAX_NAMED_OPS = 4
_SILENT = frozenset({"cast", "item"})


@dataclass(frozen=True, slots=True)
class Body:
    """A group as a call.

    Attributes:
        graph: the body, called after what it does; its outputs are the results asked for.
        operands: the outer values that it is called with, in the order of ``graph.inputs``.
        kind: "reduction" where something runs along the rows, else "elementwise".
    """

    graph: Graph
    operands: tuple[Node, ...]
    kind: str


def build_body(members: Sequence[Node], results: Sequence[Node]) -> Body:
    """The body of a group that gives ``results``, a part of its members in topological order."""
    names = _operand_names(members)
    inner: dict[Node, Node] = {
        node: input_node(name, node.type) for node, name in names.items() if node not in members
    }
    for node in inside_order(members):
        if node in inner:
            continue
        args = [None if arg is None else inner[arg] for arg in node.args]
        inner[node] = make(node.op, *args, **dict(node.attrs))
    inputs = tuple(inner[node] for node in names)
    graph = Graph(stem(members), inputs, tuple(inner[node] for node in results))
    kind = "reduction" if any(node.op in ROW_OPS for node in members) else "elementwise"
    return Body(graph, tuple(names), kind)


def stem(members: Iterable[Node]) -> str:
    """What a group does: its ops in order, the first of many."""
    ops = [node.op for node in members if node.op not in _SILENT]
    distinct = list(dict.fromkeys(ops)) or ["cast"]
    more = len(distinct) - MAX_NAMED_OPS
    tail = [f"and_{more}"] if more > 0 else []
    return "_".join(distinct[:MAX_NAMED_OPS] + tail)


def named_bodies(bodies: Iterable[Graph], existing: Mapping[str, Graph]) -> Mapping[Graph, Graph]:
    """Bodies with hashes in their names: four digits, more where different ones agree in those.

    ``existing`` are the graphs, by name, that the graph holds already.
    """
    named: dict[Graph, Graph] = {}
    taken = dict(existing)
    for body in bodies:
        if body in named:
            continue
        digest, digits = _digest(body), 4
        final = _renamed(body, f"{body.name}_{digest[:digits]}")
        while taken.setdefault(final.name, final) != final:
            digits += 4
            final = _renamed(body, f"{body.name}_{digest[:digits]}")
        named[body] = final
    return named


def _digest(body: Graph) -> str:
    # The text says all of a body but its name, which must not matter.
    return hashlib.sha256(str(_renamed(body, "body")).encode()).hexdigest()


def _renamed(body: Graph, name: str) -> Graph:
    return Graph(name, body.inputs, body.outputs)


def _operand_names(members: Sequence[Node]) -> dict[Node, str]:
    """A name for each outer operand: the one that the op reading it first has for it."""
    inside = set(members)
    taken = {*RESERVED_NAMES, "param", "body"}
    for node in inside_order(members):
        taken |= {symbol for type_ in node.types for symbol in type_.symbols}
    readers: dict[Node, str] = {}
    for node in inside_order(members):
        if node in inside or is_view(node):
            spec = schema(node.op).operands
            for name, arg in zip(spec, node.args, strict=True):
                if arg is not None:
                    readers.setdefault(arg, name.strip("?"))
    names: dict[Node, str] = {}
    for node in inside_order(members):
        if node in inside or is_view(node) or node.op == "const":
            continue
        name, count = readers[node], 1
        while name in taken:
            name, count = f"{readers[node]}_{count}", count + 1
        taken.add(name)
        names[node] = name
    return names
