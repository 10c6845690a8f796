"""What quantization of a model cost, and what it saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...codegen.program import Json
from ...ir.graph import Graph
from ...passes.quantize import Recipe, quantize
from ...passes.smooth import smooth
from .compare import LENGTH, STRIDE, Comparison, compare, graph_logits
from .layers import LayerError, layer_errors, with_dense_weights

LAYER_TOKENS = 128  # that errors of layers are measured on


@dataclass(frozen=True, slots=True)
class Quality:
    """A quantized model against itself before.

    Attributes:
        text: that was measured on.
        held_out: whether it is not the text that the model was calibrated with.
        comparison: of the predictions.
        layers: errors of each quantized linear.
    """

    text: str
    held_out: bool
    comparison: Comparison
    layers: tuple[LayerError, ...]

    def to_json(self) -> dict[str, Json]:
        """As plain data, for ``report.json``."""
        figures: Mapping[str, Json] = dict(self.comparison.to_json())
        layers: list[Json] = [dict(layer.to_json()) for layer in self.layers]
        return {"text": self.text, "held_out": self.held_out, **figures, "layers": layers}


def assess(
    graph: Graph,
    recipe: Recipe,
    ids: Sequence[int],
    text: str,
    held_out: bool,
    longest: int | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> Quality:
    """Measures what a recipe costs a causal LM.

    Args:
        graph: before quantization and without a cache (calibrate.recipe.plain_graph).
        recipe: to quantize it by.
        ids: tokens of a text.
        text: what it is called.
        held_out: whether the recipe does not come from it.
        longest: the longest sequence that the model takes.
        advance: called with the share that is done.
    """
    before = smooth(graph, recipe.smooth) if recipe.smooth else graph
    after = quantize(before, recipe)
    length = min(LENGTH, longest or LENGTH)
    found = compare(
        graph_logits(graph),
        graph_logits(with_dense_weights(after)),
        ids,
        length,
        max(min(STRIDE, length // 2), 1),
        advance,
    )
    sample = torch.tensor([list(ids[: min(LAYER_TOKENS, length)])])
    layers = layer_errors(before, after, recipe, (sample,))
    return Quality(text, held_out, found, tuple(layers))
