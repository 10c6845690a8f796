"""Cuts a graph into regions for a library and single eager calls, in an order that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Graph
from ..ir.node import Node
from .constants import is_constant


@dataclass(frozen=True, slots=True)
class Region:
    """A convex group of nodes, in order, and those of its values that others need."""

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Single:
    """A node that runs by itself."""

    node: Node


def partition(graph: Graph, converts: Callable[[Node], bool]) -> list[Region | Single]:
    """The fewest convex regions of the nodes that ``converts`` takes, the other nodes between them.

    The level of a node is the number of times that paths to it come back from a single node into a
    region. A region is all that converts at one level: no path can leave it and return, since
    returning raises the level. Constants belong to no region: each takes those it needs along, and
    the singles' are calls of their own.
    """
    singles = _singles(graph, converts)
    levels = _levels(graph, singles)
    plan: list[Region | Single] = []
    for level in range(max(levels.values(), default=0) + 1):
        members = tuple(n for n, at in levels.items() if at == level and n not in singles)
        if members:
            plan.append(Region(members, _outputs(graph, members, levels, singles)))
        plan.extend(Single(n) for n, at in levels.items() if at == level and n in singles)
    return [step for step in plan if not isinstance(step, Region) or step.outputs]


def _singles(graph: Graph, converts: Callable[[Node], bool]) -> set[Node]:
    """Nodes that run by themselves, with the constants that only calls can give them."""
    singles: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("input", "param") or is_constant(node):
            continue
        refused = node.operands[0] in singles if node.op == "item" else not converts(node)
        if refused:
            singles.add(node)
    waiting = [o for node in singles for o in node.operands]
    waiting += [o for o in graph.outputs if is_constant(o)]
    while waiting:
        node = waiting.pop()
        if is_constant(node) and node.op != "param" and node not in singles:
            singles.add(node)
            waiting.extend(node.operands)
    return singles


def _levels(graph: Graph, singles: set[Node]) -> dict[Node, int]:
    levels: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op in ("input", "param") or (is_constant(node) and node not in singles):
            continue
        level = 0
        for operand in node.operands:
            if operand in levels:
                back = operand in singles and node not in singles and not is_constant(operand)
                level = max(level, levels[operand] + back)
        levels[node] = level
    return levels


def _outputs(
    graph: Graph, members: tuple[Node, ...], levels: dict[Node, int], singles: set[Node]
) -> tuple[Node, ...]:
    inside = set(members)
    wanted = set(graph.outputs)
    for node in graph.nodes:
        if node not in inside and node in levels:
            wanted.update(node.operands)
    return tuple(node for node in members if node in wanted and len(node.types) == 1)
