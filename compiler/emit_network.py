"""A network for TensorRT, run by the reference of its layers beside the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..codegen.tensorrt.decoder import Lowered
from ..codegen.tensorrt.kernel import Reference
from ..ir.graph import Graph, input_name
from ..ir.interpreter import interpret
from .trial import outputs_error

_FEEDS = {"token_ids": "input_ids", "positions": "position_ids"}


def network_error(lowered: Lowered, graph: Graph, inputs: Sequence[torch.Tensor]) -> float:
    """The largest relative error of a network over one prompt, before TensorRT sees it.

    Args:
        lowered: the network of a decoder.
        graph: over slots, that it was made from.
        inputs: of the graph, of one sequence.

    Raises:
        VerificationError: it computes something else than the interpreter.
    """
    with torch.no_grad():
        wanted = interpret(graph, inputs)
    given, olds = {}, []
    for node, value in zip(graph.inputs, inputs, strict=True):
        name = input_name(node)
        if "_cache_" in name:
            olds.append(value.clone())  # they are written in place
        elif name in _FEEDS:
            given[_FEEDS[name]] = value[None]
        else:
            given[name] = value
    results = {"logits": torch.empty_like(wanted[0])}
    for cache, old in zip(lowered.caches, olds, strict=True):
        given[cache.past] = results[cache.present] = old
    Reference(lowered.network)(given, results)
    found = dict(zip(graph.output_names, results.values(), strict=True))
    return outputs_error("the network for TensorRT", graph, inputs, wanted, found)
