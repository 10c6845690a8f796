"""Norms that are no launch: which decode product hands on to which, and the buffers between them.

The residual stream h [T, N] of a layer is the result of one product (o, down), and the next one
(gate_up, qkv) begins with ``rms_norm(h, w)``. With several tokens that norm would be a launch
between the two. Instead the first writes two buffers more, and the second takes them in (why that
is the same: kernels/linear_hands.py)::

    fused_4, fused_4.scaled, fused_4.squares = linear_add(attention, o, fused_0, w)
    fused_5 = rms_norm_linear_gated(fused_4, w, gate_up, fused_4.scaled, fused_4.squares)

This is the Program's business: in the graph the products are as they were. The two buffers are
written in tiles of 2 to ``MOST_HANDED`` tokens: with fewer or more nobody writes them, and nobody
reads them.

A norm whose ``stepwise`` rounds the normed h before its weight joins is handed on too: h * w is
rounded once instead, as with one token, and what comes out is closer to float64 (by a tenth).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.types import TensorType
from ...targets import Target
from ..lowering import Buffers
from ..program import Call
from .kernels.linear_hands import Hands, group_of
from .kernels.linear_tiles import Cutting, GemmTiles, Problem

T = TypeVar("T")

# Not float16: h times a weight may be beyond 65504 where the normed h times it is of order 1.
_TYPES = (DType.BF16, DType.F32)


@dataclass(frozen=True, slots=True)
class Link:
    """A product that hands on to another.

    Attributes:
        producer, consumer: the nodes.
        weight: of the norm that the consumer begins with, a param.
        group: columns of the producer's result to each sum of squares.
    """

    producer: Node
    consumer: Node
    weight: Node
    group: int


class Links:
    """The links of a graph: a product hands on to one other, and takes from one."""

    def __init__(self, links: Iterable[Link] = ()) -> None:
        links = tuple(links)
        self.to = {link.consumer: link for link in links}
        self.of = {link.producer: link for link in links}

    def hands(self, node: Node) -> Hands | None:
        """What a product takes and hands on; None for one that does neither."""
        before, behind = self.to.get(node), self.of.get(node)
        if before is None and behind is None:
            return None
        return Hands(
            0 if before is None else before.group,
            0 if behind is None else behind.group,
            DType.F32 if behind is None else behind.weight.dtype,
        )

    def extended(self, call: Call, node: Node, buffers: Buffers) -> Call:
        """A product's call with what it takes and hands on, whose buffers become known."""
        before, behind = self.to.get(node), self.of.get(node)
        operands, results = call.operands, call.results
        if before is not None:
            operands += _handed(buffers.of(before.producer)[0])
        if behind is not None:
            operands += buffers.of(behind.weight)
            names = _handed(results[0])
            rows, columns = node.shape
            assert isinstance(columns, int)
            sums = TensorType(DType.F32, (rows, columns // behind.group))
            buffers.types.update(zip(names, (node.type, sums), strict=True))
            results += names
        return replace(call, operands=operands, results=results)


def find_links(graph: Graph, target: Target, cutting: Cutting, deterministic: bool) -> Links:
    """The links of a graph whose decode products are cut as ``cutting`` says. None in a
    ``deterministic`` Program, whose sums come in one order for any number of tokens.
    """
    if deterministic:
        return Links()
    products: dict[Node, tuple[Problem, list[GemmTiles]]] = {}
    found: dict[Node, Link] = {}
    for node in graph.nodes:
        problem = Problem.located(node)
        gemms = None if problem is None else cutting.gemms(problem, target)
        if problem is None or gemms is None:
            continue
        products[node] = problem, gemms
        link = _link(problem, products)
        if link is not None:
            found.setdefault(link.producer, link)
    return Links(found.values())


def _link(
    consumer: Problem, products: Mapping[Node, tuple[Problem, list[GemmTiles]]]
) -> Link | None:
    """The link to a product from the one whose result it normalises, None where it has to take the
    norm by itself.
    """
    norm = consumer.norm
    if norm is None or norm.operands[0] is not consumer.x.source or len(norm.operands) == 1:
        return None
    outer = dict(zip(consumer.body.inputs, consumer.node.operands, strict=True))
    h, weight = (outer[operand] for operand in norm.operands)
    if h not in products or h.dtype not in _TYPES or weight.op != "param":
        return None
    group = group_of(*products[h])
    return None if group is None else Link(h, consumer.node, weight, group)


def hands_on(call: Call) -> bool:
    """Whether a call's last two results are handed on; its last operand is the norm's weight."""
    return call.results[1:] == _handed(call.results[0]) if call.results else False


def own_results(call: Call, results: Sequence[T]) -> Sequence[T]:
    """Of one thing for each of a call's results those of its node's own."""
    return results[:1] if hands_on(call) else results


def handed_values(h: torch.Tensor, weight: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """What is handed on of h [T, N]: ``scaled`` [T, N], and ``squares`` f32 [T, groups]. Nothing
    with one token.
    """
    if len(h) == 1:
        return []
    wide = h.float()
    squares = wide.square().unflatten(1, (groups, -1)).sum(-1)
    return [(wide * weight.float()).to(h.dtype), squares]


def _handed(name: str) -> tuple[str, str]:
    return f"{name}.scaled", f"{name}.squares"
