"""What quantizing each linear alone costs, so that those that cost the most can be kept."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod

import torch

from ...formats.weights import Weight
from ...ir.build import input_node, rebuild
from ...ir.graph import Graph, param_name
from ...ir.interpreter import Value, bind_symbols, interpret, last_uses, resolve_attrs
from ...ir.node import Node
from ...ir.schema import schema
from ...passes.expressions import expression_of
from ...passes.quantize import Recipe, linears_to_quantize, quantize
from ...passes.smooth import smooth
from .layers import relative_error

SCAN_TOKENS = 512  # of the text, that a scan reads
_ROWS = 64  # tokens whose logits are float64 at a time

Values = dict[Node, Value]


@dataclass(frozen=True, slots=True)
class Damage:
    """What it costs to quantize one linear, and no other.

    Attributes:
        name: of its weight.
        kl: the mean of KL(original || with this one quantized) over tokens of a text, in nats.
        output: the error of the linear's own result, relative to its norm.
        parameters: of the weight.
        bytes: that the model is larger by, where this weight is kept as it is.
    """

    name: str
    kl: float
    output: float
    parameters: int
    bytes: int

    @property
    def gain(self) -> float:
        """KL saved for each byte more, the other linears being as they were."""
        return self.kl / max(self.bytes, 1)

    @property
    def pattern(self) -> str:
        """What `QuantConfig.skip` and `--skip` take for it."""
        return glob.escape(self.name)

    def to_json(self) -> dict[str, str | float]:
        """As plain data."""
        return asdict(self)


def scan(
    graph: Graph,
    recipe: Recipe,
    ids: Sequence[int],
    advance: Callable[[float], None] = lambda share: None,
) -> list[Damage]:
    """The damage of each linear that a recipe quantizes, the most gain for a byte first.

    One walk through the graph. At each linear a copy of the run begins that has this product
    quantized (weight and, where the scheme rounds them, activations) and all others as they were.
    So each weight is loaded once, nothing is run twice up to where it differs, and memory holds
    the live values of one place in the graph, for as many runs as there are linears before it.

    Args:
        graph: before quantization and without a cache, ids [1, S] to logits [1, S, V].
        recipe: to quantize it by.
        ids: tokens of a text that the recipe does not come from.
        advance: called with the share that is done.
    """
    before = smooth(graph, recipe.smooth) if recipe.smooth else graph
    walk = _Walk(before, recipe, torch.tensor([list(ids)]))
    with torch.no_grad():
        walk.to_last_linear(lambda share: advance(share * 0.9))
        losses = walk.losses(lambda share: advance(0.9 + share * 0.1))
    found = [
        Damage(
            name,
            losses[name],
            error,
            prod(before.weights[name].shape),
            _kept_bytes(before, recipe, name),
        )
        for name, error in walk.errors.items()
    ]
    return sorted(found, key=lambda damage: -damage.gain)


class _Walk:
    """The run of the original (None) and of each linear's copy, in step."""

    def __init__(self, graph: Graph, recipe: Recipe, ids: torch.Tensor) -> None:
        self.graph, self.recipe = graph, recipe
        self.names = {
            node: name
            for name, nodes in linears_to_quantize(graph, recipe.config).items()
            for node in nodes
        }
        self.dead = last_uses(graph)
        self.bindings = bind_symbols(graph, (ids,))
        self.shared: dict[Node, torch.Tensor] = {}
        self.runs: dict[str | None, Values] = {None: dict(zip(graph.inputs, (ids,), strict=True))}
        self.errors: dict[str, float] = {}
        self.done = 0

    def to_last_linear(self, advance: Callable[[float], None]) -> None:
        """All runs up to the last linear of interest, node by node."""
        self.done = max(i for i, node in enumerate(self.graph.nodes) if node in self.names) + 1
        for index, node in enumerate(self.graph.nodes[: self.done]):
            if node.op in ("param", "input"):
                continue
            name = self.names.get(node)
            if name is not None:
                self.runs.setdefault(name, dict(self.runs[None]))
            for run, values in self.runs.items():
                values[node] = self._value(node, values)
                if name is not None and run == name:
                    values[node] = self._quantized(node, name, values)
            dead = self.dead.get(node, ())
            _drop(self.shared, dead)
            for values in self.runs.values():
                _drop(values, dead)
            advance((index + 1) / self.done)

    def losses(self, advance: Callable[[float], None]) -> dict[str, float]:
        """KL of each copy, run by run to the end: logits of one are held beside the original's."""
        wanted = self._logits(self.runs[None])
        found: dict[str, float] = {}
        for name in self.errors:
            found[name] = divergence(wanted, self._logits(self.runs.pop(name)))
            advance(len(found) / len(self.errors))
        return found

    def _logits(self, values: Values) -> torch.Tensor:
        for node in self.graph.nodes[self.done :]:
            if node.op not in ("param", "input"):
                values[node] = self._value(node, values)
                _drop(values, self.dead.get(node, ()))
        return _tensor(values[self.graph.outputs[0]])[0]

    def _value(self, node: Node, values: Values) -> Value:
        operands = [None if arg is None else self._operand(arg, values) for arg in node.args]
        value: Value = schema(node.op).reference(*operands, **resolve_attrs(node, self.bindings))
        return value

    def _operand(self, arg: Node, values: Values) -> Value:
        if arg.op != "param":
            return values[arg]
        if arg not in self.shared:
            self.shared[arg] = self.graph.weights[param_name(arg)].load()
        return self.shared[arg]

    def _quantized(self, node: Node, name: str, values: Values) -> torch.Tensor:
        """The product as the recipe has it; its first error is kept."""
        product = quantize(_alone(self.graph, node), self.recipe)
        inputs = [_tensor(values[arg]) for arg in node.operands if arg.op != "param"]
        found = interpret(product, inputs)[0]
        self.errors.setdefault(name, relative_error(found, _tensor(values[node])))
        return found


def _alone(graph: Graph, linear: Node) -> Graph:
    """One linear as a graph; its operands are the inputs."""
    inputs = {
        arg: input_node(f"x{index}", arg.type)
        for index, arg in enumerate(linear.operands)
        if arg.op != "param"
    }
    kept = {arg: arg for arg in linear.operands if arg.op == "param"}
    weights = {param_name(arg): graph.weights[param_name(arg)] for arg in kept}
    return Graph("alone", tuple(inputs.values()), (rebuild(linear, {**kept, **inputs}),), weights)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The mean of KL(wanted || found) over logits [S, V] of each, in float64: the damage of one
    linear is less than float32 tells apart.
    """
    total = 0.0
    for one, other in zip(wanted.split(_ROWS), found.split(_ROWS), strict=True):
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return max(total / len(wanted), 0.0)


def _kept_bytes(graph: Graph, recipe: Recipe, name: str) -> int:
    """How much larger a weight is than its parts."""
    weight = expression_of(graph, name)
    parts = [*recipe.parts_of(name, weight).values()]
    parts += [recipe.static[name]] if name in recipe.static else []
    return stored_bytes(weight) - sum(map(stored_bytes, parts))


def stored_bytes(weight: Weight) -> int:
    """Bytes of a weight's value."""
    return prod(weight.shape) * weight.dtype.itemsize


def _drop(values: dict[Node, Value] | dict[Node, torch.Tensor], dead: Sequence[Node]) -> None:
    for node in dead:
        values.pop(node, None)


def _tensor(value: Value) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
