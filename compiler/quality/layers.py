"""How far each quantized product is from the one that it stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import torch

from ...ir.graph import Graph, param_name
from ...ir.interpreter import Value, interpret
from ...ir.node import Node
from ...passes.expressions import expression_of
from ...passes.quantize import Recipe, linears_to_quantize
from ...passes.quantize_check import decoded

PRODUCTS = frozenset({"linear", "scaled_linear"})


@dataclass(frozen=True, slots=True)
class LayerError:
    """Errors of one linear, each relative to the norm of what it is compared with.

    Attributes:
        name: of its weight.
        weight: of what the codes stand for.
        output: of its results on a text, with the errors of all layers before it.
    """

    name: str
    weight: float
    output: float

    def to_json(self) -> dict[str, str | float]:
        """As plain data."""
        return asdict(self)


def layer_errors(
    before: Graph, after: Graph, recipe: Recipe, inputs: tuple[torch.Tensor, ...]
) -> list[LayerError]:
    """The errors of each linear that a recipe quantizes, in the graph's order.

    Args:
        before: as the pass ``quantize`` was given it.
        after: its result.
        recipe: what it was given with it.
        inputs: one tensor an input of both graphs.
    """
    chosen = linears_to_quantize(before, recipe.config)
    wanted, found = (_results(graph, chosen, inputs) for graph in (before, after))
    errors = []
    for name, (node, *_) in chosen.items():
        weight = before.weights[name].load()
        parts = {
            key.removeprefix(f"{name}."): expression_of(after, key)
            for key in after.weights
            if key.startswith(f"{name}.")
        }
        value = decoded(parts, node, recipe)
        errors.append(
            LayerError(
                name, relative_error(value, weight), relative_error(found[name], wanted[name])
            )
        )
    return errors


def _results(
    graph: Graph, names: Collection[str], inputs: tuple[torch.Tensor, ...]
) -> Mapping[str, torch.Tensor]:
    """The first result of the product with each weight, or with its parts."""
    results: dict[str, torch.Tensor] = {}

    def watch(node: Node, value: Value) -> None:
        if node.op in PRODUCTS and isinstance(value, torch.Tensor):
            name = _weight_of(node, names)
            if name is not None:
                results.setdefault(name, value)

    with torch.no_grad():
        interpret(graph, inputs, watch=watch)
    return results


def _weight_of(product: Node, names: Collection[str]) -> str | None:
    weight = product.operands[1 if product.op == "linear" else 2]
    for leaf in (weight, *weight.operands):
        if leaf.op == "param":
            name = param_name(leaf)
            for candidate in (name, name.rpartition(".")[0]):
                if candidate in names:
                    return candidate
    return None


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of a difference, relative to that of what is wanted."""
    difference, norm = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return float(difference) / (float(norm) or 1.0)
