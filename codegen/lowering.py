"""Steps that every backend shares: naming buffers, one call a node, and freeing what is dead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ..ir.graph import Graph, input_name, param_name
from ..ir.node import Node
from ..ir.printer import value_names
from ..ir.types import TensorType
from .program import Call, Program

EmitCall = Callable[[Node, tuple[str | None, ...], tuple[str, ...]], Call]


class Buffers:
    """Names of the buffers of a graph's values: one a result, inputs under their own name."""

    def __init__(self, graph: Graph) -> None:
        self.names = value_names(graph)
        self.types: dict[str, TensorType] = {}
        for node in graph.inputs:
            self.names[node] = input_name(node)
        counts = 0
        for node in graph.nodes:
            if node.op == "const":
                self.names[node] = f"const_{counts}"
                counts += 1

    def of(self, node: Node) -> tuple[str, ...]:
        """The buffers of a node's results."""
        if node.op == "item":
            index = node.attr("index")
            assert isinstance(index, int)
            return (self.of(node.operands[0])[index],)
        name = self.names[node]
        names = (
            (name,)
            if len(node.types) == 1
            else tuple(f"{name}.{i}" for i in range(len(node.types)))
        )
        self.types.update(zip(names, node.types, strict=True))
        return names

    def one(self, node: Node | None) -> str | None:
        """The buffer of a single-result node."""
        return None if node is None else self.of(node)[0]


def assemble(graph: Graph, buffers: Buffers, calls: Iterable[Call]) -> Program:
    """A Program of ``calls`` with the graph's signature, each buffer freed after its last use."""
    weights = {buffers.of(node)[0]: param_name(node) for node in graph.params}
    inputs = tuple(buffers.of(node)[0] for node in graph.inputs)
    outputs = tuple(
        (name, buffers.of(node)[0])
        for name, node in zip(graph.output_names, graph.outputs, strict=True)
    )
    kept = {*weights, *inputs, *(buffer for _, buffer in outputs)}
    planned = free_dead(list(calls), kept)
    used = {name for call in planned for name in (*call.operands, *call.results)} | kept
    types = {name: type_ for name, type_ in buffers.types.items() if name in used}
    read = {name for c in planned for name in c.operands} | {buffer for _, buffer in outputs}
    used_weights = {b: w for b, w in weights.items() if b in read}
    dropped = set(weights) - set(used_weights)
    types = {name: type_ for name, type_ in types.items() if name not in dropped}
    return Program(graph.name, types, inputs, used_weights, outputs, tuple(planned))


def free_dead(calls: Sequence[Call], kept: set[str]) -> list[Call]:
    """The calls, each with the buffers that die with it; in-place results keep their operand's
    memory alive. A buffer lives to the last call that may touch it, whatever that one's guard says:
    one that is not made frees all the same.
    """
    last: dict[str, int] = {}
    for index, call in enumerate(calls):
        for name in (*call.operands, *call.results):
            if name is not None:
                last[name] = index
    frees: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            frees.setdefault(index, []).append(name)
    return [replace(call, frees=tuple(frees.get(i, ()))) for i, call in enumerate(calls)]


def cache_aliases(inputs: Sequence[Node], outputs: Sequence[Node]) -> tuple[tuple[int, int], ...]:
    """Pairs of (cache result, cache operand) of a region over slots, which share their memory."""
    pairs = []
    for index, node in enumerate(outputs):
        source = node.operands[0] if node.op == "item" else None
        if source is not None and source.op == "slot_attention" and node.attr("index") != 0:
            cache = source.operands[3 if node.attr("index") == 1 else 4]
            if cache in inputs:
                pairs.append((index, inputs.index(cache)))
    return tuple(pairs)
