"""What quantization of a model cost, and what it saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...codegen.program import Json
from ...ir.graph import Graph
from ...passes.quantize import Recipe, quantize
from ...passes.smooth import smooth
from .compare import LENGTH, Comparison, compare, graph_logits
from .dense import with_dense_weights
from .layers import LayerError, layer_errors
from .sensitivity import SCAN_TOKENS, Damage, scan

LAYER_TOKENS = 128  # that errors of layers are measured on


@dataclass(frozen=True, slots=True)
class Quality:
    """A quantized model against itself before.

    Attributes:
        text: that was measured on.
        held_out: whether it is not the text that the model was calibrated with.
        comparison: of the predictions.
        layers: errors of each quantized linear.
        sensitivity: what each costs alone, the most gain for a byte first; empty where it is not
            asked for.
        asked: tokens of the text that were asked for.
    """

    text: str
    held_out: bool
    comparison: Comparison
    layers: tuple[LayerError, ...]
    sensitivity: tuple[Damage, ...] = ()
    asked: int | None = None

    def to_json(self) -> dict[str, Json]:
        """As plain data, for ``report.json``."""
        figures: Mapping[str, Json] = dict(self.comparison.to_json())
        layers: list[Json] = [dict(layer.to_json()) for layer in self.layers]
        damages: list[Json] = [
            {**damage.to_json(), "pattern": damage.pattern} for damage in self.sensitivity
        ]
        return {
            "text": self.text,
            "held_out": self.held_out,
            **figures,
            "tokens_asked": self.asked,
            "layers": layers,
            "sensitivity": damages,
        }


def assess(
    graph: Graph,
    recipe: Recipe,
    ids: Sequence[int],
    text: str,
    held_out: bool,
    longest: int | None = None,
    asked: int | None = None,
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
        asked: tokens that were asked for, of a text that may have fewer.
        advance: called with the share that is done.
    """
    before = smooth(graph, recipe.smooth) if recipe.smooth else graph
    after = quantize(before, recipe)
    length = min(LENGTH, longest or LENGTH)
    compared = 0.4 if recipe.config.sensitivity else 1.0
    found = compare(
        graph_logits(graph),
        graph_logits(with_dense_weights(after)),
        ids,
        length,
        length - 1,
        lambda share: advance(share * compared),
    )
    sample = torch.tensor([list(ids[: min(LAYER_TOKENS, length)])])
    layers = layer_errors(before, after, recipe, (sample,))
    damages: list[Damage] = []
    if recipe.config.sensitivity:
        some = ids[: min(SCAN_TOKENS, length)]
        damages = scan(
            graph, recipe, some, lambda share: advance(compared + share * (1 - compared))
        )
    return Quality(text, held_out, found, tuple(layers), tuple(damages), asked)
