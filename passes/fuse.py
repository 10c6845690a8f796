"""Fusion: memory-bound ops over rows end up in ``fused`` nodes with what can share a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter

from ..ir.build import item, make
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from ..ir.printer import nested_graphs
from .base import Pass
from .fuse_body import Body, build_body, named_bodies
from .fuse_groups import fusion_groups, outer_operands
from .fuse_roles import mark_roles
from .rewrite import rebuild


def fuse(graph: Graph) -> Graph:
    """Groups elementwise ops, casts, broadcasts, row lookups and reductions over the last axis.

    Before::

        def g(x: f32[T, 8], y: f32[T, 8], w: f32[8], up: f32[16, 8], down: f32[8, 8]):
            add_0: f32[T, 8] = add(x, y)
            rms_norm_0: f32[T, 8] = rms_norm(add_0, w, eps=1e-06)
            linear_0: f32[T, 16] = linear(rms_norm_0, up)
            slice_0: f32[T, 8] = slice(linear_0, dim=1, start=0, step=1, stop=8)
            slice_1: f32[T, 8] = slice(linear_0, dim=1, start=8, step=1, stop=16)
            gated_0: f32[T, 8] = gated(slice_0, slice_1, activation="silu")
            linear_1: f32[T, 8] = linear(gated_0, down)
            add_1: f32[T, 8] = add(add_0, linear_1)
            return {"out0": add_1}

    After::

        def g(x: f32[T, 8], y: f32[T, 8], w: f32[8], up: f32[16, 8], down: f32[8, 8]):
            def add_rms_norm_….(a: f32[T, 8], b: f32[T, 8], weight: f32[8]): …   # two results
            def gated_….(x: f32[T, 16]): …                                      # holds the slices
            def add_….(a: f32[T, 8], b: f32[T, 8]): …
            fused_0: (f32[T, 8], f32[T, 8],) = fused(x, y, w, body=add_rms_norm_…, kind="reduction")
            item_0: f32[T, 8] = item(fused_0, index=1)
            linear_0: f32[T, 16] = linear(item_0, up)
            fused_1: f32[T, 8] = fused(linear_0, body=gated_…, kind="elementwise",
                                       roles=("epilogue", "prologue"))
            linear_1: f32[T, 8] = linear(fused_1, down)
            item_1: f32[T, 8] = item(fused_0, index=0)
            fused_2: f32[T, 8] = fused(item_1, linear_1, body=add_…, kind="elementwise",
                                       roles=("epilogue",))
            return {"out0": fused_2}

    A group runs over one space of rows times width (passes/fuse_space.py), is convex together with
    all others, and has no more than ``MAX_OPERANDS`` operands. Its body takes in the slices and
    broadcasts of its operands. Groups of equal structure have one body, whatever their weights.

    ``roles`` marks what the matmul kernels around a group could take in: "epilogue" (elementwise
    over the rows of the one product before it) and "prologue" (all that reads it are products,
    from the left). Groups of one op are wrapped too, so that codegen finds all generated kernels
    and all roles in one place. ``inline_fused`` is the exact inverse.
    """
    graph = _in_nested(graph)
    groups = fusion_groups(graph)
    group_of = {node: index for index, members in enumerate(groups) for node in members}
    results = _results(graph, groups, group_of)
    bodies = [build_body(m, [n for n in m if n in results]) for m in groups]
    named = named_bodies((body.graph for body in bodies), nested_graphs(graph))
    values = _emit(groups, group_of, bodies, named, results)
    return mark_roles(graph.with_outputs(tuple(values[output] for output in graph.outputs)))


FUSE = Pass("fuse", fuse)


def _results(
    graph: Graph, groups: Sequence[list[Node]], group_of: Mapping[Node, int]
) -> dict[Node, None]:
    """The nodes still needed by themselves: of members, those that something outside reads."""
    demanded: dict[Node, None] = {}
    entered: set[int] = set()
    stack = list(graph.outputs)
    while stack:
        node = stack.pop()
        if node in demanded:
            continue
        demanded[node] = None
        index = group_of.get(node)
        if index is None:
            stack.extend(node.operands)
        elif index not in entered:
            entered.add(index)
            stack.extend(outer_operands(groups[index]))
    return demanded


def _emit(
    groups: Sequence[list[Node]],
    group_of: Mapping[Node, int],
    bodies: Sequence[Body],
    named: Mapping[Graph, Graph],
    results: Mapping[Node, None],
) -> dict[Node, Node]:
    """The new value of every node that is still needed."""
    order: TopologicalSorter[Node | int] = TopologicalSorter()
    for node in results:
        index = group_of.get(node)
        needed = node.operands if index is None else bodies[index].operands
        order.add(node if index is None else index, *(group_of.get(o, o) for o in needed))
    values: dict[Node, Node] = {}
    for unit in order.static_order():
        if isinstance(unit, Node):
            values[unit] = rebuild(unit, values)
            continue
        body = bodies[unit]
        operands = [values[operand] for operand in body.operands]
        call = make("fused", *operands, body=named[body.graph], kind=body.kind)
        made = [node for node in groups[unit] if node in results]
        for position, node in enumerate(made):
            values[node] = call if len(made) == 1 else item(call, position)
    return values


def _in_nested(graph: Graph) -> Graph:
    """The graph with those that its nodes hold (branches, not bodies) fused."""
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        new = rebuild(node, values)
        if node.op != "fused" and any(isinstance(value, Graph) for _, value in node.attrs):
            attrs: dict[str, Attr] = {
                name: fuse(value) if isinstance(value, Graph) else value
                for name, value in node.attrs
            }
            new = make(node.op, *new.args, **attrs)
        values[node] = new
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))
