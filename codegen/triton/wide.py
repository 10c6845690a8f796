"""Products of many tokens, and what stands behind them, as kernels of ours at some numbers of
tokens, in a Program that takes any step.

Such a Program's products are the library's, and what stands behind them is generated. A tuner finds
from how many tokens on, and to how many, one kernel of ours is faster (kernels/wide_linear.py):
it is measured at ``BUCKETS``, and neighbours of one choice are one share::

    linear_2 = linear(x, gate_up)             guard: 511 - T      the library
    fused_4 = gated(linear_2)                 guard: 511 - T      a generated kernel
    fused_4 = linear_gated(x, gate_up)        guard: T - 512

Untuned a gated MLP's first product and its gate are ours from ``FEWEST`` tokens on, which writes
nothing in between, and all else is the library's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ...ir.build import input_node, make
from ...ir.dims import Dim, Size
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.ops.control import body_of
from ...targets import Target
from .cuts import Cuts
from .generate_space import BODY_VIEWS
from .kernels.linear_tiles import Problem
from .kernels.wide_linear_tiles import FEWEST, WideTiles, default_wide, fills, takes_wide
from .shares import guard_of

BUCKETS = (256, 512, 1024, 2048, 4096, 8192)
"""Fewest tokens of each choice, at which it is measured: it holds up to the next one, the last one
for more. Fewer tokens are the library's.
"""


@dataclass(frozen=True, slots=True)
class Product:
    """A product that a kernel can compute with what stands behind it.

    Attributes:
        linear: the product by itself.
        last: whose result it is: what reads the product, alone, or the product.
        problem: both as one.
    """

    linear: Node
    last: Node
    problem: Problem


@dataclass(frozen=True, slots=True)
class WideShare:
    """What one candidate computes.

    Attributes:
        tiles: of our kernel; None where the library computes it.
        guard: on the number of tokens, as a Call has it.
    """

    tiles: WideTiles | None
    guard: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Wide:
    """A product, and the shares of the candidates, in order of their tokens."""

    product: Product
    shares: tuple[WideShare, ...]


def find_wide(graph: Graph, target: Target, cuts: Cuts | None = None) -> Mapping[Node, Wide]:
    """By its nodes, ``linear`` and ``last``, each product of which our kernel has a share."""
    found: dict[Node, Wide] = {}
    known: dict[object, tuple[WideShare, ...]] = {}  # layers are alike, and a tuner is slow to ask
    for product in wide_products(graph, target):
        p = product.problem
        types = tuple(operand.type for operand in p.node.operands)
        alike = (p.body, types, p.x.row, p.x.offset, tuple(p.places.values()))
        shares = known.get(alike)
        if shares is None:
            shares = known[alike] = tuple(_shares(p, target, cuts))
        if len(shares) > 1:
            found[product.linear] = found[product.last] = Wide(product, shares)
    return found


def wide_products(graph: Graph, target: Target) -> Sequence[Product]:
    """The products of a graph that the kernel takes, over the rows that most products have: a head
    multiplies those of few tokens alone.
    """
    linears = [node for node in graph.nodes if node.op == "linear" and _tokens(node) is not None]
    if not linears:
        return ()
    ((tokens, _),) = Counter(map(_tokens, linears)).most_common(1)
    made = (_product(graph, node, target) for node in linears if _tokens(node) == tokens)
    return tuple(product for product in made if product is not None)


def default_tiles(problem: Problem, target: Target, tokens: int) -> WideTiles | None:
    """What is taken untuned for so many tokens at least; None for the library."""
    plain = problem.norm is None and problem.bias is None and not problem.places
    gated = problem.parts == 2 and plain and fills(problem, target)
    return default_wide(problem) if gated and tokens >= FEWEST else None


def _shares(problem: Problem, target: Target, cuts: Cuts | None) -> Iterator[WideShare]:
    chosen: list[tuple[int, WideTiles | None]] = [(0, None)]
    for tokens in BUCKETS:
        tiles = default_tiles(problem, target, tokens)
        if cuts is not None:
            tiles = cuts.wide(problem.node, tokens, tiles)
        chosen.append((tokens, tiles))
    groups = [(tiles, next(own)[0]) for tiles, own in groupby(chosen, key=lambda pair: pair[1])]
    ends: list[int | None] = [low - 1 for _, low in groups[1:]]
    for (tiles, low), high in zip(groups, [*ends, None], strict=True):
        guard = guard_of(problem.tokens, low, high)
        assert guard is not None, "of a number of tokens that is a symbol"
        yield WideShare(tiles, guard)


def _tokens(linear: Node) -> Dim | None:
    """The symbol of a product's rows; None where they are no matrix, or so many and no others."""
    rows = linear.shape[0] if linear.type.rank == 2 else None
    return rows if isinstance(rows, Dim) else None


def _product(graph: Graph, linear: Node, target: Target) -> Product | None:
    """With what reads it where the kernel takes that too, else alone."""
    users = graph.users[linear]
    if len(users) == 1 and linear not in graph.outputs and _is_behind(users[0], linear):
        problem = Problem.located(_joined(linear, users[0]))
        if problem is not None and takes_wide(problem, target):
            return Product(linear, users[0], problem)
    problem = Problem.located(_joined(linear, None))
    taken = problem is not None and takes_wide(problem, target)
    return Product(linear, linear, problem) if problem is not None and taken else None


def _is_behind(node: Node, linear: Node) -> bool:
    """Whether a node is elementwise over a product's rows and columns, or over its two halves."""
    if node.op != "fused" or node.attr("kind") != "elementwise":
        return False
    body = body_of(node)
    places = [i for i, arg in enumerate(node.args) if arg is linear]
    if len(body.outputs) != 1 or len(places) != 1:
        return False
    inner, (output,) = body.inputs[places[0]], body.outputs
    if output.type.rank != 2 or output.op in BODY_VIEWS or output is inner:
        return False
    parts = [n for n in body.nodes if n.op in BODY_VIEWS and inner in n.operands]
    others = [n for n in body.nodes if n.op not in (*BODY_VIEWS, "input", "const")]
    whole = inner.shape == output.shape and not parts
    return (whole or _are_halves(parts, inner, output, others)) and all(
        n.shape == output.shape for n in others
    )


def _are_halves(parts: Sequence[Node], inner: Node, output: Node, others: Sequence[Node]) -> bool:
    """Whether a body reads its input [T, 2 N] as two halves of its columns, and no other way."""
    n = output.shape[1]
    if not isinstance(n, int) or inner.shape != (output.shape[0], 2 * n):
        return False
    if any(inner in node.operands for node in others):
        return False
    halves = {(1, start, 1, start + n) for start in (0, n)}
    found = [
        tuple(part.attr(name) for name in ("dim", "start", "step", "stop"))
        for part in parts
        if part.op == "slice"
    ]
    return len(found) == len(parts) > 0 and set(found) <= halves


def _joined(linear: Node, behind: Node | None) -> Node:
    """A product, and what stands behind it, as one ``fused`` node of kind "linear"."""
    outer = list(linear.operands)
    inputs = [input_node(name, arg.type) for name, arg in zip(_NAMES, outer, strict=False)]
    bias = inputs[2] if linear.args[2] is not None else None
    result = make("linear", *inputs[:2], bias)
    name = "linear"
    if behind is not None:
        body = body_of(behind)
        values: dict[Node, Node] = {}
        for inner, arg in zip(body.inputs, behind.operands, strict=True):
            if arg is linear:
                values[inner] = result
                continue
            values[inner] = input_node(f"beside_{len(outer)}", inner.type)
            inputs.append(values[inner])
            outer.append(arg)
        for node in body.nodes:
            if node not in values:
                args = [None if arg is None else values[arg] for arg in node.args]
                values[node] = make(node.op, *args, **dict(node.attrs))
        result = values[body.outputs[0]]
        name = f"linear_{body.name}"
    joined = replace(Graph("body", tuple(inputs), (result,)), name=name)
    return make("fused", *outer, body=joined, kind="linear")


_NAMES = ("x", "weight", "bias")
