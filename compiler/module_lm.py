"""Plain modules that are causal LMs: token ids i64[1, S] in, logits [1, S, V] out, over one
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import UnsupportedError
from ..formats.weights import Weight
from ..ir.dims import Size
from ..ir.graph import Graph
from ..ir.interpreter import interpret
from ..ir.node import Node
from ..runtime.structure import Leaf
from .capture import DynamicShapes, Examples, capture_module
from .capture_types import Captured
from .lowering import lower

_PROBE = 8


def example_ids(example_inputs: Examples | None) -> torch.Tensor | None:
    """The token ids i64[1, S] if they are the only input, else None."""
    if not isinstance(example_inputs, tuple | list | Mapping) or len(example_inputs) != 1:
        return None
    named = isinstance(example_inputs, Mapping)
    (ids,) = example_inputs.values() if named else example_inputs  # type: ignore[union-attr]
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        return None
    return ids if ids.shape[0] == 1 and ids.shape[1] > 1 else None


def capture_module_lm(module: nn.Module, example_inputs: Examples) -> Captured:
    """Captures a plain module over `example_ids` with the number of tokens dynamic.

    Raises:
        CaptureError: torch.export cannot follow it, or not for every length.
        UnsupportedError: the result is not one tensor of logits [1, S, V].
    """
    tokens = {1: torch.export.Dim.AUTO}
    shapes: DynamicShapes = (tokens,)
    if isinstance(example_inputs, Mapping):
        shapes = dict.fromkeys(example_inputs, tokens)
    captured = capture_module(module, example_inputs, shapes)
    outputs = captured.graph_module.graph.output_node().args[0]
    fake = outputs[0].meta.get("val") if isinstance(captured.output, Leaf) else None  # type: ignore[index, union-attr]
    fits = isinstance(fake, torch.Tensor) and fake.dim() == 3 and fake.is_floating_point()
    if not fits or not captured.symbols:
        raise UnsupportedError(
            f"module {captured.name}",
            expected="one tensor of logits [1, S, V] for token ids [1, S], for every S",
            found="a fixed length" if fits else "another result",
            remedy="Compile it as a plain module with kv_cache=None.",
        )
    return captured


def lower_module_lm(
    captured: Captured, name: str, weights: Mapping[str, Weight]
) -> tuple[Graph, int | None]:
    """The graph of such a module, and the longest sequence that its tables allow.

    Raises:
        UnsupportedError: logits over something else than the ids' vocabulary.
    """
    graph = lower(captured, name, weights)
    ids, logits = graph.inputs[0], graph.outputs[0]
    rows = {n.operands[0].shape[0] for n in graph.nodes if n.op == "embedding" and _reads(n, ids)}
    if logits.type.rank != 3 or rows != {logits.shape[-1]}:
        raise UnsupportedError(
            f"module {captured.name}",
            expected="logits over the vocabulary of the token ids",
            found=f"{logits.type} for embeddings of {sorted(map(str, rows))} rows",
            remedy="Compile it as a plain module with kv_cache=None.",
        )
    return graph, longest_sequence(graph, captured.symbols[0].upper)


def longest_sequence(graph: Graph, upper: int | None) -> int | None:
    """How many tokens the position tables and causal buffers of a decoder over ids [1, S] hold.

    Args:
        upper: the bound that export found, None for none.
    """
    ids = graph.inputs[0]
    size = ids.shape[1]
    limits = [] if upper is None else [upper]
    for node in graph.nodes:
        if node.op == "slice" and node.attr("stop") == size:
            length = node.operands[0].shape[int(node.attr("dim"))]  # type: ignore[arg-type]
            limits += [length] if isinstance(length, int) else []
        elif node.op in ("embedding", "index_select") and not _reads(node, ids):
            limits += _table_limit(graph, node, size)
    return min(limits, default=None)


def _reads(node: Node, ids: Node) -> bool:
    """Whether the index of a lookup is computed from the token ids."""
    return ids in _ancestors(node.operands[1])


def _ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in seen:
            seen.add(top)
            stack.extend(top.operands)
    return seen


def _table_limit(graph: Graph, node: Node, size: Size) -> list[int]:
    """Rows of a table less the offset of the positions that look it up."""
    table, index = node.operands
    dim = int(node.attr("dim")) if node.op == "index_select" else 0  # type: ignore[arg-type]
    rows = table.shape[dim]
    if size not in index.shape or not isinstance(rows, int):
        return []
    if any(n.op in ("param", "input") for n in _ancestors(index)):
        return []
    probe = Graph("positions", graph.inputs, (index,), {}, ("index",))
    (found,) = interpret(probe, (torch.zeros(1, _PROBE, dtype=torch.int64),), {})
    return [rows - (int(found.max()) - (_PROBE - 1))]
