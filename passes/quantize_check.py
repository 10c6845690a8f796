"""What a quantized graph must agree with: the old one over the numbers that the codes stand for.

Activations are rounded here by elementary ops of the IR, so that the check does not rest on the ops
that it checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import VerificationError
from ..ir.build import cast, const, make, param, rebuild, reshape
from ..ir.dtypes import DType
from ..ir.graph import Graph, Weight, param_name
from ..ir.interpreter import interpret
from ..ir.node import Node
from ..ir.types import TensorType
from ..ir.widen import widened
from .expressions import expression_of
from .quantize import Recipe, linears_to_quantize
from .schemes import Linear, Parts

_LARGEST = {DType.I8: 127.0, DType.F8E4M3: 448.0}
MAX_WEIGHT_ERROR = 0.5
"""Of the weights that codes stand for, relative to the weights' own norm. Four bits cost a tenth;
what is beyond a half is no rounding, but codes in a wrong place."""


def expected_graph(recipe: Recipe, before: Graph, after: Graph) -> Graph:
    """``before`` with each quantized weight as its codes have it, and x rounded as the scheme does.

    Raises:
        VerificationError: codes that are not those of the weight.
    """
    chosen = linears_to_quantize(before, recipe.config)
    weights = {name: _Decoded(name, nodes[0], recipe, before) for name, nodes in chosen.items()}
    rounded = {node for nodes in chosen.values() for node in nodes}
    if recipe.scheme.activations == "none":
        rounded = set()
    values: dict[Node, Node] = {}
    for node in before.nodes:
        values[node] = rebuild(node, values)
        if node in rounded:
            x, weight, bias = values[node].args
            assert x is not None
            static = None
            if recipe.scheme.activations == "tensor":
                static = float(recipe.static[param_name(node.operands[1])].load())
            rows = rounded_rows(x, recipe.scheme.codes, recipe.config.group or 0, static)
            wide = [None if a is None else cast(a, rows.dtype) for a in (weight, bias)]
            values[node] = cast(make("linear", rows, *wide), node.dtype)
    outputs = tuple(values[output] for output in before.outputs)
    return before.with_weights(weights).with_outputs(outputs)


def rounded_rows(x: Node, codes: DType, group: int, static: float | None) -> Node:
    """x, rounded to what its codes stand for, in float32 at least; a node for each step."""
    width = x.shape[-1]
    assert isinstance(width, int)
    wide = cast(x, DType.F32) if x.dtype is not DType.F64 else x
    lead = x.shape[:-1]
    if group:
        pads = (*((0, 0) for _ in lead), (0, -width % group))
        padded = make("pad", wide, pads=pads, value=0.0)
        count = -(-width // group)
        parts = _rounded(reshape(padded, *lead, count, group), codes, static)
        whole = reshape(parts, *lead, count * group)
        dim = x.type.rank - 1
        wide = make("slice", whole, dim=dim, start=0, stop=width) if width % group else whole
    else:
        wide = _rounded(wide, codes, static)
    return wide


def _rounded(x: Node, codes: DType, static: float | None) -> Node:
    def number(value: float) -> Node:
        return const(value, x.dtype)

    largest = _LARGEST[codes]
    if static is None:
        most = make("amax", make("abs", x), dims=(x.type.rank - 1,), keepdim=True)
        scale = make("div", most, number(largest))
        scale = make("where", make("eq", scale, number(0.0)), number(1.0), scale)
    else:
        scale = number(static)
    steps = make("minimum", make("div", x, scale), number(largest))
    steps = make("maximum", steps, number(-largest))
    steps = make("round", steps) if codes is DType.I8 else cast(cast(steps, codes), x.dtype)
    return make("mul", steps, scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Decoded:
    """The weight that parts stand for, as a weight of its own."""

    name: str
    node: Node
    recipe: Recipe
    before: Graph

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._old.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._old.dtype

    @property
    def _old(self) -> Weight:
        return self.before.weights[self.name]

    def load(self) -> torch.Tensor:
        """The parts' value; VerificationError where it is not near the weight."""
        found, wanted = self._value(), self._old.load().double()
        error = (found.double() - wanted).norm().item() / (wanted.norm().item() or 1.0)
        if not error <= MAX_WEIGHT_ERROR:
            raise VerificationError(
                f"quantized weight {self.name!r}",
                expected=f"codes of it, within {MAX_WEIGHT_ERROR:g} of its norm",
                found=f"{error:.3g}",
                remedy="Correct the scheme, or keep the product with QuantConfig(skip=…).",
            )
        return found

    def _value(self) -> torch.Tensor:
        parts = self.recipe.parts_of(self.name, expression_of(self.before, self.name))
        return decoded(parts, self.node, self.recipe)


def decoded(parts: Parts, node: Node, recipe: Recipe) -> torch.Tensor:
    """The weight [N, K] of a linear that parts stand for: for products of codes, which never round
    it, in float64.
    """
    rounded = recipe.scheme.activations == "none"
    dtype = node.dtype if rounded else DType.F64
    nodes = {
        suffix: param(suffix, TensorType(DType.from_torch(w.dtype), tuple(w.shape)))
        for suffix, w in parts.items()
    }
    rows, width = node.operands[1].shape
    linear = Linear(node.operands[0], None, int(str(rows)), int(str(width)), dtype)
    value = recipe.scheme.value(nodes, linear, recipe.config)
    graph = Graph("weight", (), (value,), dict(parts))
    with torch.no_grad():
        if rounded:
            return interpret(graph, ())[0]
        wide = widened(graph, DType.F64)
        loaded = {
            param_name(node): parts[param_name(node)].load().to(node.dtype.torch)
            for node in wide.params
        }
        return interpret(wide, (), loaded)[0]
