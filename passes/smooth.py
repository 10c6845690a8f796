"""Scales moved from activations into weights, where a norm or a gate makes the activations.

Dividing column k of x by s[k] and multiplying column k of the weight with it changes no result.
The division costs nothing where it goes into the weight of a norm (SmoothQuant, Xiao et al.,
2211.10438) or into the rows of an up projection, which ``act(gate) * up`` is linear in (AWQ, Lin et
al., 2306.00978).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from ..formats.weights import Weight, apply_weight
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from .base import Pass

NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True, slots=True)
class Site:
    """A value that can be divided by a vector at no cost.

    Attributes:
        x: the value [..., K], which only linears read.
        names: the weights of these linears.
        divided: names of the weights that make x, each with the first of the K rows or elements
            that become x, and whether it is a matrix.
    """

    x: Node
    names: tuple[str, ...]
    divided: tuple[tuple[str, int], ...]


def smooth_sites(graph: Graph, names: Collection[str]) -> list[Site]:
    """The sites of a graph all of whose linears have weights among ``names``, used nowhere else."""
    sites = []
    for x in graph.nodes:
        if x.op not in (*NORMS, "gated") or x in graph.outputs:
            continue
        readers = graph.users[x]
        fits = all(_reads(reader, x, graph, names) for reader in readers)
        divided = _of_norm(x, graph) if x.op in NORMS else _of_gate(x, graph)
        if readers and fits and divided:
            weights = tuple(param_name(reader.operands[1]) for reader in readers)
            sites.append(Site(x, weights, divided))
    return sites


def _reads(linear: Node, x: Node, graph: Graph, names: Collection[str]) -> bool:
    if linear.op != "linear" or linear.operands[0] is not x or linear.operands[1].op != "param":
        return False
    weight = linear.operands[1]
    return param_name(weight) in names and len(graph.users[weight]) == 1


def _of_norm(norm: Node, graph: Graph) -> tuple[tuple[str, int], ...]:
    affine = [arg for arg in norm.args[1:] if arg is not None]
    alone = all(arg.op == "param" and len(graph.users[arg]) == 1 for arg in affine)
    if norm.args[1] is None or not alone:
        return ()
    return tuple((param_name(arg), 0) for arg in affine)


def _of_gate(gated: Node, graph: Graph) -> tuple[tuple[str, int], ...]:
    """The rows of a linear that become ``up``, which nothing but the gate reads."""
    gate, up = gated.operands if len(gated.operands) == 2 else (None, None)
    if gate is None or up is None or gate is up or graph.users[up] != (gated,):
        return ()
    linear, start = up, 0
    if up.op == "slice":
        linear, bounds = up.operands[0], (up.attr("start"), up.attr("step"))
        others = [user for user in graph.users[linear] if user is not up]
        if not isinstance(bounds[0], int) or bounds[1] != 1 or linear in graph.outputs:
            return ()
        if up.attr("dim") != linear.type.rank - 1 or any(not _apart(o, up) for o in others):
            return ()
        start = bounds[0]
    parts = linear.operands[1:]
    alone = all(part.op == "param" and len(graph.users[part]) == 1 for part in parts)
    if linear.op != "linear" or not alone:
        return ()
    return tuple((param_name(part), start) for part in parts)


def _apart(other: Node, up: Node) -> bool:
    """Whether another reader of the linear reads none of the columns that ``up`` is."""
    if other.op != "slice" or other.attr("dim") != up.attr("dim"):
        return False
    (a, b), (c, d) = (
        (int(str(node.attr("start"))), int(str(node.attr("stop")))) for node in (other, up)
    )
    return b <= c or d <= a


def smooth(graph: Graph, vectors: Mapping[str, Weight]) -> Graph:
    """Moves scales into the weights of linears, and out of what makes their inputs.

    The graph stays as it is; with ``vectors = {"up.weight": s}`` and ``linear(rms_norm(x, norm),
    up)`` the weights become ``up.weight = up.weight * s`` and ``norm.weight = norm.weight / s``.

    Args:
        graph: linears over norms and gates.
        vectors: by name of a linear's weight: the scales [K] of its columns, above zero. Linears
            of one input have one vector.
    """
    weights: dict[str, Weight] = dict(graph.weights)  # type: ignore[arg-type]
    for site in smooth_sites(graph, vectors):
        vector = vectors[site.names[0]]
        for name in site.names:
            weights[name] = _scaled("mul", weights[name], vector)
        for name, start in site.divided:
            weights[name] = _divided(weights[name], vector, start)
    return graph.with_weights(weights)


def _scaled(op: str, weight: Weight, vector: Weight) -> Weight:
    scaled = apply_weight(op, (weight, vector))
    return scaled if scaled.dtype == weight.dtype else _cast(scaled, weight)


def _divided(weight: Weight, vector: Weight, start: int) -> Weight:
    """``weight`` [M] or [M, K'] with its rows from ``start`` on divided by the vector."""
    count, width = weight.shape[0], vector.shape[0]
    column = vector
    if len(weight.shape) == 2:
        column = apply_weight("reshape", (vector,), shape=(width, 1))
    cuts = ((0, start), (start, start + width), (start + width, count))
    parts = [apply_weight("slice", (weight,), dim=0, start=a, stop=b) for a, b in cuts]
    parts[1] = _scaled("div", parts[1], column)
    kept = [part for part, (a, b) in zip(parts, cuts, strict=True) if a < b]
    return kept[0] if len(kept) == 1 else apply_weight("concat", tuple(kept), dim=0)


def _cast(weight: Weight, like: Weight) -> Weight:
    return apply_weight("cast", (weight,), dtype=like.dtype)


def smooth_pass(vectors: Mapping[str, Weight]) -> Pass:
    """``smooth`` by the vectors of a calibration."""
    return Pass("smooth", partial(smooth, vectors=vectors))
