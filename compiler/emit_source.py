"""What models for other runtimes are made from: a causal LM, captured, its graph over slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..codegen.base import get_backend
from ..errors import UnsupportedError
from ..ir.graph import Graph
from ..ir.node import Node
from ..passes.driver import VerifyLevel
from ..passes.heads import HeadPlan
from ..passes.quantize import Recipe
from .api import sample_ids
from .changes import changed_graphs
from .graphs import Passed
from .hf_model import capture_causal_lm
from .inspect.layers import layer_numbers
from .lowering import lower
from .open_model import open_model
from .options import CompileOptions
from .quantizing import check_stored
from .sample_model import sample_source
from .sources import Source

Changes: TypeAlias = "tuple[HeadPlan | None, Recipe | None]"


def open_causal_lm(model: object, options: CompileOptions) -> Source:
    """The source of a causal LM.

    Raises:
        UnsupportedError: a model of another kind.
    """
    source = open_model(model, options)
    check_stored(source, options)
    if source.is_causal_lm:
        return source
    raise UnsupportedError(
        source.name,
        expected="a causal LM: a Hugging Face model, a model folder or a .gguf file",
        found="a plain module",
        remedy="Compile it to an engine with tilewright.compile(module, inputs).",
    )


def captured(source: Source, name: str) -> Graph:
    """The graph of its module, before the passes."""
    return lower(capture_causal_lm(source.module), name, source.weights)


def slot_graphs(
    graph: Graph,
    changes: Changes,
    level: VerifyLevel,
    samples: Sequence[torch.Tensor],
    options: CompileOptions,
) -> Passed:
    """What the passes make of a captured graph, over slots.

    Raises:
        UnsupportedError: a model whose tokens mix outside of attention.
        VerificationError: a pass that computes something else.
    """
    heads, recipe = changes
    try:
        backend = get_backend(options.backend)
        return changed_graphs(graph, "slot", backend, level, samples, options, recipe, heads)
    except UnsupportedError as error:
        raise UnsupportedError(
            error.culprit,
            expected=error.expected,
            found=error.found,
            remedy="Only a causal LM with a KV cache is emitted; tilewright.compile makes an "
            "engine of other models, with kv_cache=None.",
        ) from error


def cut_graphs(
    source: Source, limit: int, changes: Changes, options: CompileOptions
) -> tuple[Passed, tuple[torch.Tensor]] | None:
    """The `slot_graphs` of the model cut to one layer of each kind, every pass compared, and the
    token ids that they were compared for; None where numbers of it are not wanted, or it has no
    such cut.

    Raises:
        UnsupportedError, VerificationError: as `slot_graphs`.
    """
    cut = sample_source(source) if options.verify == "sample" else None
    if cut is None:
        return None
    graph = captured(cut, "sample")
    samples = (sample_ids(graph, limit),)
    return slot_graphs(graph, changes, "full", samples, options), samples


def layer_names(graph: Graph) -> dict[Node, str]:
    """The decoder layer of each node that has one."""
    numbers, count = layer_numbers(graph)
    return {node: f"layers.{number}" for node, number in numbers.items() if 0 <= number < count}
