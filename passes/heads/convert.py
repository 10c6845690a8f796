"""KV heads become fewer: new rows of the projections, and what undoes in Q and the output what was
done to K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from ...formats.weights import Held, Weight, apply_weight
from ...ir.build import make, param, rebuild
from ...ir.dtypes import DType
from ...ir.graph import Graph, param_name
from ...ir.node import Node
from ...ir.types import TensorType
from ..base import Pass
from ..expressions import expression_of
from .config import GQA
from .sites import HeadSite, Projection, head_sites

Remake: TypeAlias = Callable[[Weight], Weight]


@dataclass(frozen=True, slots=True, eq=False)
class LayerMaps:
    """How the G KV heads of one attention become g, with n = G / g.

    Attributes:
        order: the old KV heads in their new order; each n of them share one new head.
        keys: [g, D, n * D]: a new head's keys from those of its old heads, one below the other.
        values: [g, E, n * E]: the same of values.
        queries: [G, D, D]: for each old KV head, in the new order, what its query heads are
            multiplied by; None for nothing.
        outputs: [G, E, E]: what the attended values are multiplied by where the output reads them;
            None for nothing.
    """

    order: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """g, the KV heads that are left."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The conversion of a model.

    Attributes:
        config: that was asked for.
        layers: maps by HeadSite.name, of those that change.
        errors: likewise: of scores and of outputs (compiler/heads/fit.py), each relative.
        text: the text whose activations were looked at; None where weights alone were.
    """

    config: GQA
    layers: Mapping[str, LayerMaps]
    errors: Mapping[str, tuple[float, float]]
    text: str | None = None


def convert_heads(graph: Graph, plan: HeadPlan) -> Graph:
    """Gives attention fewer KV heads.

    Before, with 4 heads of 8::

        linear_1: f32[1, S, 32] = linear(x, k_weight)
        reshape_1: f32[1, S, 4, 8] = reshape(linear_1, shape=(1, S, 4, 8))
        permute_1: f32[1, 4, S, 8] = permute(reshape_1, dims=(0, 2, 1, 3))
        attention_0: f32[1, 4, S, 8] = attention(q, permute_1, v, causal=True, scale=0.35)

    After, in two groups, with ``k.weight = map_rows(held("k.keys"), take(stored("k.weight"),
    held("k.rows"), dim=0))``; the rows of q and v and the columns of the output's weight likewise::

        linear_1: f32[1, S, 16] = linear(x, k_weight)
        reshape_1: f32[1, S, 2, 8] = reshape(linear_1, shape=(1, S, 2, 8))
        permute_1: f32[1, 2, S, 8] = permute(reshape_1, dims=(0, 2, 1, 3))
        attention_0: f32[1, 4, S, 8] = attention(q, permute_1, v, causal=True, scale=0.35)
    """
    weights: dict[str, Weight] = {}
    ends: dict[Node, tuple[HeadSite, LayerMaps]] = {}
    for site in sites_of(graph, plan):
        ends[site.output] = (site, plan.layers[site.name])
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        if node not in ends:
            values[node] = rebuild(node, values)
            continue
        site, maps = ends[node]
        values[node] = _converted(site, maps, graph, values, weights)
    outputs = tuple(values[output] for output in graph.outputs)
    # Names are those of the old weights: what reads these still is of another type.
    return graph.with_weights(weights).with_outputs(outputs)


def sites_of(graph: Graph, plan: HeadPlan) -> list[HeadSite]:
    """The sites of a graph that a plan changes."""
    found = [site for site in head_sites(graph) if isinstance(site, HeadSite)]
    return [site for site in found if site.name in plan.layers]


def _converted(
    site: HeadSite,
    maps: LayerMaps,
    graph: Graph,
    values: Mapping[Node, Node],
    weights: dict[str, Weight],
) -> Node:
    """The site's output over fewer KV heads; its new weights are entered."""
    x = values[site.k.linear.operands[0]]
    heads, _, width, value_width = site.sizes
    rows = Rows(site, maps, graph)
    parts = (
        (site.q, rows.queries, (heads, width)),
        (site.k, rows.keys, (maps.groups, width)),
        (site.v, rows.values, (maps.groups, value_width)),
    )
    operands = []
    for part, remake, sizes in parts:
        value = _linear(part, x, graph, remake, weights)
        for step in part.steps:
            own = {other: values[other] for other in step.operands[1:]}
            value = _step(step, value, own, sizes)
        operands.append(value)
    rest = [None if arg is None else values[arg] for arg in site.attention.args[3:]]
    value = make("attention", *operands, *rest, **dict(site.attention.attrs))
    for step in site.joined:
        value = make(step.op, value, **dict(step.attrs))
    name = param_name(site.output.operands[1])
    weight = _enter(name, rows.output(expression_of(graph, name)), weights)
    bias = site.output.args[2]
    return make("linear", value, weight, None if bias is None else values[bias])


def _linear(
    part: Projection, x: Node, graph: Graph, remake: Remake, weights: dict[str, Weight]
) -> Node:
    old = part.linear.operands[1]
    weight = _enter(part.name, remake(rows_of(part, graph, old)), weights)
    bias = None
    if part.bias is not None:
        bias = _enter(part.bias_name, remake(rows_of(part, graph, part.bias)), weights)
    return make("linear", x, weight, bias)


def _step(step: Node, value: Node, others: Mapping[Node, Node], sizes: tuple[int, int]) -> Node:
    attrs = dict(step.attrs)
    if step.op == "reshape":
        attrs["shape"] = (*step.shape[:-2], *sizes)
    rest = [None if arg is None else others[arg] for arg in step.args[1:]]
    return make(step.op, value, *rest, **attrs)


def _enter(name: str, weight: Weight, weights: dict[str, Weight]) -> Node:
    weights[name] = weight
    return param(name, TensorType(DType.from_torch(weight.dtype), tuple(weight.shape)))


def rows_of(part: Projection, graph: Graph, source: Node) -> Weight:
    """The rows of a projection's weight or bias that its heads are."""
    weight = expression_of(graph, param_name(source))
    if (part.start, part.stop) == (0, weight.shape[0]):
        return weight
    return apply_weight("slice", (weight,), dim=0, start=part.start, stop=part.stop)


class Rows:
    """The weights of a site made anew, as expressions: nothing is read."""

    def __init__(self, site: HeadSite, maps: LayerMaps, graph: Graph) -> None:
        self.maps, self.name = maps, site.name
        heads, kv_heads, self.width, self.value_width = site.sizes
        self.repeats = heads // kv_heads

    def keys(self, rows: Weight) -> Weight:
        """[G * D, …] -> [g * D, …]."""
        return self._mapped("keys", self.maps.keys, self._ordered(rows, "k_rows", self.width))

    def values(self, rows: Weight) -> Weight:
        """[G * E, …] -> [g * E, …]."""
        ordered = self._ordered(rows, "v_rows", self.value_width)
        return self._mapped("values", self.maps.values, ordered)

    def queries(self, rows: Weight) -> Weight:
        """[H * D, …], in the new order."""
        ordered = self._ordered(rows, "q_rows", self.repeats * self.width)
        return self._mapped("queries", self.maps.queries, ordered)

    def output(self, weight: Weight) -> Weight:
        """[N, H * E], its columns in the new order."""
        ordered = self._ordered(weight, "o_columns", self.repeats * self.value_width, dim=1)
        if self.maps.outputs is None:
            return ordered
        turned = apply_weight("permute", (ordered,), dims=(1, 0))
        maps = self.maps.outputs.transpose(1, 2).contiguous()
        return apply_weight("permute", (self._mapped("outputs", maps, turned),), dims=(1, 0))

    def shared_keys(self, rows: Weight) -> Weight:
        """[G * D, …]: the keys of each old head that the new ones stand for, in the old order."""
        return self._shared(self.keys(rows), self.maps.queries, "shared_keys", self.width)

    def shared_values(self, rows: Weight) -> Weight:
        """[G * E, …], likewise."""
        back = None if self.maps.outputs is None else self.maps.outputs.transpose(1, 2)
        return self._shared(self.values(rows), back, "shared_values", self.value_width)

    def _shared(self, few: Weight, maps: torch.Tensor | None, name: str, width: int) -> Weight:
        count = len(self.maps.order) // self.maps.groups
        index = [head // count for head in range(len(self.maps.order))]
        many = self._taken(few, index, f"{name}.heads", width, 0)
        back = None if maps is None else maps.transpose(1, 2).contiguous()
        inverse = sorted(range(len(index)), key=self.maps.order.__getitem__)
        return self._taken(self._mapped(name, back, many), inverse, f"{name}.rows", width, 0)

    def _ordered(self, weight: Weight, name: str, width: int, dim: int = 0) -> Weight:
        return self._taken(weight, self.maps.order, name, width, dim)

    def _taken(
        self, weight: Weight, heads: Sequence[int], name: str, width: int, dim: int
    ) -> Weight:
        if list(heads) == list(range(len(heads))):
            return weight
        index = torch.tensor(heads)[:, None] * width + torch.arange(width)
        held = Held(index.flatten(), f"{self.name}.{name}")
        return apply_weight("take", (weight, held), dim=dim)

    def _mapped(self, name: str, maps: torch.Tensor | None, rows: Weight) -> Weight:
        if maps is None:
            return rows
        wide = maps if rows.dtype == torch.float64 else maps.float()
        return apply_weight("map_rows", (Held(wide, f"{self.name}.{name}"), rows))


def expected_heads(plan: HeadPlan, before: Graph, after: Graph) -> Graph:
    """``before`` with keys and values that each head shares with its group, in as many heads as
    there were: queries and outputs are as they were, so that their new maps are held against it.
    """
    weights: dict[str, Weight] = {}
    for site in sites_of(before, plan):
        rows = Rows(site, plan.layers[site.name], before)
        for part, remake in ((site.k, rows.shared_keys), (site.v, rows.shared_values)):
            for source in part.linear.operands[1:]:
                name = param_name(source)
                whole = weights.get(name) or expression_of(before, name)
                weights[name] = _replaced(whole, part, remake(rows_of(part, before, source)))
    return before.with_weights(weights)


def _replaced(whole: Weight, part: Projection, rows: Weight) -> Weight:
    """``whole`` with the rows of a projection exchanged."""
    cuts = ((0, part.start), (part.stop, whole.shape[0]))
    kept = [apply_weight("slice", (whole,), dim=0, start=a, stop=b) for a, b in cuts]
    parts = [part for part in (kept[0], rows, kept[1]) if part.shape[0]]
    return parts[0] if len(parts) == 1 else apply_weight("concat", tuple(parts), dim=0)


def heads_pass(plan: HeadPlan) -> Pass:
    """``convert_heads`` by a plan. Its result is held against ``expected_heads``."""
    return Pass(
        "convert_heads",
        partial(convert_heads, plan=plan),
        expected=partial(expected_heads, plan),
    )
