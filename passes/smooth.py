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
from typing import TypeAlias

from ..formats.weights import Weight, apply_weight
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from .base import Pass
from .expressions import expressions
from .token_rows import picks_rows

NORMS = ("rms_norm", "layer_norm")
_ATTENTION = frozenset({"attention", "paged_attention", "slot_attention"})
_HEADS_FIRST = (0, 2, 1, 3)  # [1, S, H, D] to [1, H, S, D] and back


@dataclass(frozen=True, slots=True)
class Site:
    """A value that can be divided by a vector at no cost.

    Attributes:
        x: the value [..., K], which only linears read.
        names: the weights of these linears.
        divided: names of the weights that make x, each with the first of its rows or elements that
            become x.
        heads: (G, R, D) where x is the attention of G heads of values of D columns, each read by R
            query heads: the vector has G * D elements, and K is G * R * D; else (1, 1, K).
    """

    x: Node
    names: tuple[str, ...]
    divided: tuple[tuple[str, int], ...]
    heads: tuple[int, int, int]


def smooth_sites(graph: Graph, names: Collection[str]) -> list[Site]:
    """The sites of a graph all of whose linears have weights among ``names``, used nowhere else."""
    sites = []
    for x in graph.nodes:
        readers = graph.users[x]
        if x in graph.outputs or not readers:
            continue
        if not all(_reads(reader, x, graph, names) for reader in readers):
            continue
        found = _makers(x, graph)
        if found is not None and found[0]:
            weights = tuple(param_name(reader.operands[1]) for reader in readers)
            sites.append(Site(x, weights, *found))
    return sites


Makers: TypeAlias = "tuple[tuple[tuple[str, int], ...], tuple[int, int, int]] | None"


def _makers(x: Node, graph: Graph) -> Makers:
    """``divided`` and ``heads`` of a site; None for a value that is none."""
    if picks_rows(x) and graph.users[x.operands[0]] == (x,):  # fewer rows, the same columns
        return _makers(x.operands[0], graph)
    if x.op == "reshape":
        return _of_attention(x, graph)
    width = x.shape[-1] if len(x.types) == 1 and x.type.rank else None
    if not isinstance(width, int):
        return None
    if x.op in NORMS:
        return _of_norm(x, graph), (1, 1, width)
    if x.op == "gated" and len(x.operands) == 2:
        gate, up = x.operands
        return (() if gate is up else _rows_of(up, x, graph)), (1, 1, width)
    return None


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


def _rows_of(value: Node, reader: Node, graph: Graph) -> tuple[tuple[str, int], ...]:
    """The rows of a linear that become ``value``, which nothing else than ``reader`` reads."""
    if graph.users[value] != (reader,) or value in graph.outputs:
        return ()
    linear, start = value, 0
    if value.op == "slice":
        linear, first = value.operands[0], value.attr("start")
        others = [user for user in graph.users[linear] if user is not value]
        if not isinstance(first, int) or value.attr("step") != 1 or linear in graph.outputs:
            return ()
        last = value.attr("dim") == linear.type.rank - 1
        if not last or any(not _apart(other, value) for other in others):
            return ()
        start = first
    parts = linear.operands[1:]
    alone = all(part.op == "param" and len(graph.users[part]) == 1 for part in parts)
    if linear.op != "linear" or not alone:
        return ()
    return tuple((param_name(part), start) for part in parts)


def _apart(other: Node, value: Node) -> bool:
    """Whether another reader of the linear reads none of the columns that ``value`` is."""
    if other.op != "slice" or other.attr("dim") != value.attr("dim"):
        return False
    (a, b), (c, d) = (
        (int(str(node.attr("start"))), int(str(node.attr("stop")))) for node in (other, value)
    )
    return b <= c or d <= a


def _of_attention(x: Node, graph: Graph) -> Makers:
    """Attention is linear in its values, and so are caches: the rows of the linear that makes
    these, for x that is the heads side by side.
    """
    attended, last = _unpermuted(x.operands[0], x, graph)
    if graph.users[attended] != (last,) or x.operands[0].shape[:-2] != x.shape[:-1]:
        return None
    if attended.op == "item" and attended.attr("index") == 0:
        attended = attended.operands[0]
    if attended.op not in _ATTENTION:
        return None
    values, reader = attended.args[2], attended
    if values is None or values in attended.args[:2]:
        return None
    if values.op == "kv_write":
        if graph.users[values] != (attended,):
            return None
        values, reader = values.operands[1], values
    values, reader = _unpermuted(values, reader, graph)
    if values.op != "reshape" or graph.users[values] != (reader,):
        return None
    shape, flat = values.shape, values.operands[0]
    query, heads, width = x.operands[0].shape[-2], shape[-2], shape[-1]
    if flat.shape[:-1] != shape[:-2] or not all(type(n) is int for n in (query, heads, width)):
        return None
    sizes = int(str(heads)), int(str(query)) // int(str(heads)), int(str(width))
    return _rows_of(flat, values, graph), sizes


def _unpermuted(value: Node, reader: Node, graph: Graph) -> tuple[Node, Node]:
    """What is below a permutation of heads that ``reader`` alone reads, and its reader."""
    turned = value.op == "permute" and value.attr("dims") == _HEADS_FIRST
    if turned and graph.users[value] == (reader,):
        return value.operands[0], value
    return value, reader


def smooth(graph: Graph, vectors: Mapping[str, Weight]) -> Graph:
    """Moves scales into the weights of linears, and out of what makes their inputs.

    The graph stays as it is; with ``vectors = {"up.weight": s}`` and ``linear(rms_norm(x, norm),
    up)`` the weights become ``up.weight = up.weight * s`` and ``norm.weight = norm.weight / s``.

    Args:
        graph: linears over norms and gates.
        vectors: by name of a linear's weight: the scales of its columns, above zero: [K], or one
            for each column of values (Site.heads). Linears of one input have one vector.
    """
    weights = expressions(graph)
    for site in smooth_sites(graph, vectors):
        vector = vectors[site.names[0]]
        for name in site.names:
            weights[name] = _scaled("mul", weights[name], _repeated(vector, site.heads))
        for name, start in site.divided:
            weights[name] = _divided(weights[name], vector, start)
    return graph.with_weights(weights)


def _repeated(vector: Weight, heads: tuple[int, int, int]) -> Weight:
    """[G * D] -> [G * R * D]."""
    count, times, width = heads
    if times == 1:
        return vector
    apart = apply_weight("reshape", (vector,), shape=(count, 1, width))
    repeated = apply_weight("expand", (apart,), shape=heads)
    return apply_weight("reshape", (repeated,), shape=(count * times * width,))


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
