"""Projections of one input become one matmul: q, k and v; gate and up."""

from __future__ import annotations

from collections.abc import Sequence

from ..formats.stored_codes import grid_of
from ..formats.weights import Weight, apply_weight
from ..ir.build import make, param
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from ..ir.types import TensorType
from .base import Pass
from .expressions import expressions
from .rewrite import rebuild


def merge_projections(graph: Graph) -> Graph:
    """Merges linears that read the same value, when their weights are params of one type used
    nowhere else.

    Before::

        linear_0: f32[S, 64] = linear(x, q_weight)
        linear_1: f32[S, 32] = linear(x, k_weight)

    After, with ``q+k.weight = concat(stored("q.weight"), stored("k.weight"), dim=0)``::

        linear_0: f32[S, 96] = linear(x, q_k_weight)
        slice_0: f32[S, 64] = slice(linear_0, dim=1, start=0, stop=64)
        slice_1: f32[S, 32] = slice(linear_0, dim=1, start=64, stop=96)

    Where only some have a bias, the others get zeros. Weights that a checkpoint holds in codes
    merge where their codes do: those of one grid.
    """
    groups = _groups(graph)
    if not groups:
        return graph
    weights = expressions(graph)
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in groups and node not in values:
            x = values[node.operands[0]]
            values |= _merge(groups[node], x, weights)
        elif node not in values:
            values[node] = rebuild(node, values)
    outputs = tuple(values[output] for output in graph.outputs)
    return graph.with_weights(weights).with_outputs(outputs)


def _groups(graph: Graph) -> dict[Node, Sequence[Node]]:
    """Of each linear to be merged: all that merge with it, itself included."""
    groups: dict[Node, Sequence[Node]] = {}
    for x, users in graph.users.items():
        alike: dict[object, list[Node]] = {}
        for user in users:
            if _mergeable(user, x, graph):
                weight = graph.weights[param_name(user.operands[1])]
                alike.setdefault(grid_of(weight), []).append(user)
        for found in alike.values():
            if len(found) > 1:
                groups |= dict.fromkeys(found, found)
    return groups


def _mergeable(linear: Node, x: Node, graph: Graph) -> bool:
    if linear.op != "linear" or linear.operands[0] is not x:
        return False
    weight, bias = linear.operands[1], linear.args[2]
    if weight.op != "param" or len(graph.users[weight]) > 1:
        return False
    return bias is None or bias.op == "param"


def _merge(linears: Sequence[Node], x: Node, weights: dict[str, Weight]) -> dict[Node, Node]:
    weight = _concat([linear.operands[1] for linear in linears], weights)
    biases = [linear.args[2] for linear in linears]
    bias = None
    if any(b is not None for b in biases):
        bias = _concat(
            [b or _zeros(n, weights) for b, n in zip(biases, linears, strict=True)], weights
        )
    merged = make("linear", x, weight, bias)
    slices, start = {}, 0
    for linear in linears:
        size = linear.shape[-1]
        assert isinstance(size, int)
        slices[linear] = make(
            "slice", merged, dim=merged.type.rank - 1, start=start, stop=start + size
        )
        start += size
    return slices


def _concat(params: Sequence[Node], weights: dict[str, Weight]) -> Node:
    expression = apply_weight("concat", tuple(weights[param_name(p)] for p in params), dim=0)
    return _enter(merged_name([param_name(p) for p in params]), expression, weights)


def _zeros(linear: Node, weights: dict[str, Weight]) -> Node:
    """A bias of zeros, as an expression: padding of an empty part of the weight, whose type it
    has.
    """
    name = param_name(linear.operands[1])
    empty = apply_weight("slice", (weights[name],), dim=1, start=0, stop=0)
    padded = apply_weight("pad", (empty,), dim=1, before=0, after=1)
    return _enter(
        f"{name}.no_bias", apply_weight("reshape", (padded,), shape=padded.shape[:1]), weights
    )


def _enter(name: str, weight: Weight, weights: dict[str, Weight]) -> Node:
    weights[name] = weight
    return param(name, TensorType(DType.from_torch(weight.dtype), tuple(weight.shape)))


def merged_name(names: Sequence[str]) -> str:
    """``a.q.weight, a.k.weight → a.q+k.weight``."""
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    head = 0
    while head < shortest - 1 and len({p[head] for p in parts}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head - 1 and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    middles = [".".join(p[head : len(p) - tail]) for p in parts]
    end = parts[0][len(parts[0]) - tail :] if tail else []
    return ".".join([*parts[0][:head], "+".join(middles), *end])


MERGE_PROJECTIONS = Pass("merge_projections", merge_projections)
