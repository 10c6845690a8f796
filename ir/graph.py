"""Graphs: named inputs, outputs, the nodes between them, and the weights that their params name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from .node import Node


class Weight(Protocol):
    """Where a param's value comes from; formats/weights.py has the expressions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, known without loading it."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tensor, known without loading it."""

    def load(self) -> torch.Tensor:
        """The tensor itself, contiguous and on the CPU."""


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A pure function from tensors to tensors.

    Attributes:
        name: an identifier.
        inputs: ``input`` nodes, in calling order.
        outputs: nodes whose values are returned, each with a single result.
        weights: value of each ``param`` by name; empty in bodies, where params do not occur.
        output_names: one name an output; by default ``out0, out1, …``. An output that has the
            name of an input is state: its value replaces the input's for the next call, in place.
    """

    name: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    weights: Mapping[str, Weight] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.output_names:
            names = tuple(f"out{i}" for i in range(len(self.outputs)))
            object.__setattr__(self, "output_names", names)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All inputs and all nodes that the outputs need, operands before users, in fixed order."""
        order: dict[Node, None] = dict.fromkeys(self.inputs)
        for output in self.outputs:
            _visit(output, order)
        return tuple(order)

    @cached_property
    def users(self) -> Mapping[Node, tuple[Node, ...]]:
        """The nodes that read each node, once each, in topological order."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands):
                users[operand].append(node)
        return {node: tuple(found) for node, found in users.items()}

    @property
    def params(self) -> tuple[Node, ...]:
        """The ``param`` nodes in use."""
        return tuple(node for node in self.nodes if node.op == "param")

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the inputs that an output of the same name replaces."""
        names = {input_name(node) for node in self.inputs}
        return tuple(name for name in self.output_names if name in names)

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols of the input shapes."""
        return frozenset().union(*(node.type.symbols for node in self.inputs))

    def input(self, name: str) -> Node:
        """The input called ``name``; KeyError when there is none."""
        return {input_name(node): node for node in self.inputs}[name]

    def calls(self) -> Iterator[Node]:
        """The nodes that compute: neither input nor param nor const nor item."""
        return (n for n in self.nodes if n.op not in ("input", "param", "const", "item"))

    def key(self) -> tuple[object, ...]:
        """What equality rests on. Node identity stands for structure."""
        return (self.name, self.inputs, self.outputs, self.output_names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        # Short: graphs stand in error messages as attributes of nodes.
        return f"<graph {self.name}: {len(self.inputs)} inputs, {len(self.outputs)} outputs>"

    def __str__(self) -> str:
        from .printer import print_graph

        return print_graph(self)

    def with_outputs(self, outputs: tuple[Node, ...]) -> Graph:
        """The same graph with other outputs under the same names; unused weights are dropped."""
        graph = replace(self, outputs=outputs)
        used = {param_name(node) for node in graph.params}
        return replace(graph, weights={k: v for k, v in self.weights.items() if k in used})

    def with_weights(self, weights: Mapping[str, Weight]) -> Graph:
        """The same graph with ``weights`` added."""
        return replace(self, weights={**self.weights, **weights})

    def replace_param(
        self,
        old: str,
        parts: Mapping[str, Weight],
        expr: Callable[[Mapping[str, Node]], Node],
        readers: Collection[Node] | None = None,
    ) -> Graph:
        """The same graph with a weight in parts, and an expression over them in its place.

        Args:
            old: name of the param.
            parts: weights by suffix; they are entered as ``<old>.<suffix>``.
            expr: gives the value, of the param's type, from the params of the parts by suffix.
            readers: the nodes that read the value; None for all that read the param.

        Raises:
            GraphError: no such param, a part whose name is taken, or a value of another type.
        """
        from .replace import Swap, replace_params

        return replace_params(self, {old: Swap(parts, expr, readers)})


def input_name(node: Node) -> str:
    """Name of an ``input`` node."""
    return str(node.attr("name"))


def param_name(node: Node) -> str:
    """Name of a ``param`` node: the key into ``Graph.weights``."""
    return str(node.attr("name"))


def _visit(root: Node, order: dict[Node, None]) -> None:
    """Depth first without recursion: captured graphs are thousands of nodes deep."""
    stack: list[tuple[Node, Iterator[Node]]] = [(root, iter(root.operands))]
    entered = {root}
    while stack:
        node, operands = stack[-1]
        for operand in operands:
            if operand not in order and operand not in entered:
                entered.add(operand)
                stack.append((operand, iter(operand.operands)))
                break
        else:
            order.setdefault(node)
            stack.pop()
