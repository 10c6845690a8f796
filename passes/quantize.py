"""Linears of quantized weights: the parts and expression of a scheme in place of each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial

from ..errors import UsageError
from ..formats.weights import Weight
from ..ir.build import param, rebuild
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from ..ir.replace import Swap, replace_params
from ..ir.schema import schema
from ..ir.types import TensorType
from .base import Pass
from .expressions import expression_of
from .schemes import SCHEMES, Linear, Nodes, Parts, QuantConfig, Scheme
from .token_rows import check_rows, is_ragged

_FLOATS = (DType.F64, DType.F32, DType.F16, DType.BF16)
_SHAPING = frozenset({"reshape", "slice", "permute", "expand", "item"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to quantize, and what calibration found for it.

    Attributes:
        config: resolved (schemes.resolve_config).
        smooth: by name of a weight [N, K]: a vector [K] that its columns are multiplied by, and
            what makes its x divided by (passes/smooth.py).
        made: by name of a weight: parts that calibration chose, instead of rounding to nearest.
        static: by name of a weight: the scale [1] of its x.
    """

    config: QuantConfig
    smooth: Mapping[str, Weight] = field(default_factory=dict)
    made: Mapping[str, Parts] = field(default_factory=dict)
    static: Mapping[str, Weight] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        """The scheme of the configuration."""
        return SCHEMES[self.config.scheme]

    def parts_of(self, name: str, weight: Weight) -> Parts:
        """The parts of a weight: those that calibration chose, else rounded to nearest."""
        return self.made.get(name) or self.scheme.parts(weight, self.config)


def linears_to_quantize(graph: Graph, config: QuantConfig) -> dict[str, list[Node]]:
    """The linears whose weights are params, by the weight's name, without what is to stay: the
    product that gives the logits, those that route to experts (their codes would send tokens
    elsewhere, and save next to nothing), and names that match ``config.skip``.
    """
    stay = router_products(graph) | (set() if config.lm_head else head_products(graph))
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "linear" or node.operands[1].op != "param" or node.dtype not in _FLOATS:
            continue
        name = param_name(node.operands[1])
        skipped = any(fnmatchcase(name, pattern) for pattern in config.skip)
        if not skipped and node not in stay:
            found.setdefault(name, []).append(node)
    return found


def check_skips(graph: Graph, config: QuantConfig) -> None:
    """Raises UsageError for a pattern of ``config.skip`` that matches no linear's weight."""
    names = linears_to_quantize(graph, replace(config, skip=(), lm_head=True))
    for pattern in config.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"QuantConfig.skip {pattern!r}",
                expected=f"a pattern of weights' names, such as {', '.join(list(names)[:3])}",
                found="one that matches none",
                remedy="Correct the pattern, or leave it out.",
            )


def head_products(graph: Graph) -> set[Node]:
    """The linears that give logits: as many columns as an embedding has rows, and nothing but
    elementwise ops and views between them and the first output.
    """
    tables = (
        n.operands[0].shape[0]
        for n in graph.nodes
        if n.op in ("embedding", "index_select") and n.operands[0].op == "param"
    )
    rows, found, waiting = set(tables), set[Node](), [graph.outputs[0]]
    while waiting:
        node = waiting.pop()
        if node.op == "linear":
            found |= {node} if node.shape[-1] in rows else set()
        elif node.op in _SHAPING or schema(node.op).elementwise:
            waiting.extend(node.operands)
    return found


def router_products(graph: Graph) -> set[Node]:
    """The linears that the choice of experts comes from."""
    calls = (node for node in graph.nodes if node.op == "moe_experts")
    waiting = [operand for node in calls for operand in node.operands[1:3]]
    found, seen = set[Node](), set(waiting)
    while waiting:
        node = waiting.pop()
        if node.op == "linear":
            found.add(node)
            continue
        waiting += [operand for operand in node.operands if operand not in seen]
        seen.update(node.operands)
    return found


def quantize(graph: Graph, recipe: Recipe) -> Graph:
    """Exchanges the weights of linears for the parts of a scheme.

    Before::

        linear_0: f32[T, 96] = linear(x, w)

    After, with "int4" in groups of 32::

        dequantize_0: f32[96, 64] = dequantize(w_codes, w_scale, dtype=f32, group=32, width=64, …)
        linear_0: f32[T, 96] = linear(x, dequantize_0)

    With "int8", which quantizes activations too::

        quantize_rows_0: (i8[T, 64], f32[T, 1],) = quantize_rows(x, dtype=i8, group=0)
        scaled_linear_0: f32[T, 96] = scaled_linear(item_0, item_1, w_codes, w_scale, …)

    Raises:
        UnsupportedError: a scheme whose ops mix tokens of a ragged graph.
    """
    chosen = linears_to_quantize(graph, recipe.config)
    swaps: dict[str, Swap] = {}
    parts_of: dict[Node, tuple[str, Nodes]] = {}
    for name, nodes in chosen.items():
        parts = recipe.parts_of(name, expression_of(graph, name))
        swaps[name] = Swap(parts, _expression(name, nodes[0], recipe, parts_of), frozenset(nodes))
    result = _with_products(replace_params(graph, swaps), recipe, parts_of)
    if is_ragged(result):
        check_rows(result)
    return result


def _expression(
    name: str, node: Node, recipe: Recipe, parts_of: dict[Node, tuple[str, Nodes]]
) -> Callable[[Nodes], Node]:
    def value(parts: Nodes) -> Node:
        made = recipe.scheme.value(parts, _linear(node, node.operands[0]), recipe.config)
        parts_of[made] = (name, parts)
        return made

    return value


def _linear(node: Node, x: Node, static: Node | None = None) -> Linear:
    rows, width = node.operands[1].shape
    assert isinstance(rows, int) and isinstance(width, int)
    return Linear(x, node.args[2], rows, width, node.dtype, static)


def _with_products(
    graph: Graph, recipe: Recipe, parts_of: Mapping[Node, tuple[str, Nodes]]
) -> Graph:
    """The graph with the scheme's own products, where it has such."""
    values: dict[Node, Node] = {}
    static: dict[str, Weight] = {}
    for node in graph.nodes:
        values[node] = rebuild(node, values)
        if node.op == "linear" and node.operands[1] in parts_of:
            name, parts = parts_of[node.operands[1]]
            scale = _static(name, recipe, static)
            linear = _linear(node, values[node.operands[0]], scale)
            values[node] = recipe.scheme.product(parts, linear, recipe.config) or values[node]
    outputs = tuple(values[output] for output in graph.outputs)
    return graph.with_weights(static).with_outputs(outputs)


def _static(name: str, recipe: Recipe, static: dict[str, Weight]) -> Node | None:
    """The param of the calibrated scale of x, entered among the weights."""
    if recipe.scheme.activations != "tensor":
        return None
    if name not in recipe.static:
        raise UsageError(
            f"weight {name!r}",
            expected=f"a calibrated scale of its input, which {recipe.scheme.name} needs",
            found="none",
            remedy="Compile a causal LM with a tokenizer, or choose 'fp8', which needs none.",
        )
    full = f"{name}.input_scale"
    static[full] = recipe.static[name]
    return param(full, TensorType(DType.from_torch(static[full].dtype), (1,)))


def quantize_pass(recipe: Recipe) -> Pass:
    """``quantize`` by a recipe. Its result is held against the old graph over the weights that the
    parts stand for, and over rounded activations.
    """
    from .quantize_check import expected_graph

    return Pass(
        "quantize", partial(quantize, recipe=recipe), expected=partial(expected_graph, recipe)
    )
