"""Splits a graph into layers, what comes before and what comes after; folds layers alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.graph import Graph, param_name
from ...ir.node import Node
from ...ir.printer import print_attr

HIDDEN = frozenset({"input", "param", "const", "item"})
_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.)")  # model.layers.7.mlp.…, h.7.attn.…


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive nodes that are drawn together.

    Attributes:
        title: for the heading.
        nodes: those that compute, of the first layer where layers are alike.
        repeat: how many layers it stands for.
    """

    title: str
    nodes: tuple[Node, ...]
    repeat: int = 1


def split_layers(graph: Graph) -> list[Block]:
    """The graph as blocks. A layer is what the params with its number in their name feed.

    A graph whose params have no such numbers is one block.
    """
    layer_of, last = layer_numbers(graph)
    calls = list(graph.calls())
    if last == 0:
        return [Block("graph", tuple(calls))]
    groups: dict[int, list[Node]] = {index: [] for index in range(-1, last + 1)}
    for node in calls:
        groups[layer_of[node]].append(node)
    blocks = [Block("before the layers", tuple(groups[-1]))]
    layers = [groups[index] for index in range(last)]
    tail = _cut_tail(layers) + groups[last]
    blocks += _fold(layers)
    return [block for block in (*blocks, Block("after the layers", tuple(tail))) if block.nodes]


def layer_numbers(graph: Graph) -> tuple[dict[Node, int], int]:
    """Layer of each node (-1: before the first), and their number: that of nodes after them."""
    numbers = {
        node: int(found[1])
        for node in graph.params
        if (found := _INDEX.search(param_name(node))) is not None
    }
    count = max(numbers.values(), default=-1) + 1
    layer: dict[Node, int] = {}
    for node in graph.nodes:
        own = [numbers[arg] for arg in node.operands if arg in numbers]
        before = max((layer.get(arg, -1) for arg in node.operands), default=-1)
        unnumbered = any(arg.op == "param" and arg not in numbers for arg in node.operands)
        if own:
            layer[node] = max(*own, before) if before < count else before
        elif unnumbered and before >= 0 and count:
            layer[node] = count
        else:
            layer[node] = before
    return layer, count


def _cut_tail(layers: list[list[Node]]) -> list[Node]:
    """Takes off the last layer what the one before lacks at its end: the rows to sample."""
    if len(layers) < 2:
        return []
    length = len(layers[-2])
    if signature(layers[-1][:length]) != signature(layers[-2]):
        return []
    tail = layers[-1][length:]
    del layers[-1][length:]
    return tail


def _fold(layers: Sequence[list[Node]]) -> list[Block]:
    blocks: list[Block] = []
    start = 0
    while start < len(layers):
        stop = start + 1
        first = signature(layers[start])
        while stop < len(layers) and signature(layers[stop]) == first:
            stop += 1
        alike = stop - start
        title = f"layer {start}" if alike == 1 else f"layers {start} to {stop - 1}"
        blocks.append(Block(title, tuple(layers[start]), alike))
        start = stop
    return blocks


def signature(nodes: Sequence[Node]) -> tuple[object, ...]:
    """What two layers that compute the same, with other weights, have in common."""
    index = {node: i for i, node in enumerate(nodes)}
    return tuple(
        (
            node.op,
            tuple(map(str, node.types)),
            tuple((name, print_attr(value)) for name, value in node.attrs),
            tuple(
                index.get(arg, str(arg.types[0]) if arg.op in HIDDEN else -1)
                for arg in node.operands
            ),
        )
        for node in nodes
    )
