"""The decode graph: every sequence brings one token, and wants its logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from ..ir.build import input_node, make
from ..ir.dims import Size, substitute, symbol
from ..ir.graph import Graph, input_name
from ..ir.node import Node
from ..ir.types import TensorType
from .base import Pass, Tensors
from .pick_rows import substituted
from .token_rows import picks_rows

_OVER_PAGES = frozenset({"paged_attention", "scaled_paged_attention"})
_DROPPED = frozenset({"query_start", "logits_indices"})
_ROWS: Mapping[str, Size] = {"T": symbol("B"), "R": symbol("B")}


def one_token(graph: Graph, page_size: int | None = None) -> Graph:
    """A paged decoder over ragged tokens, restricted to steps of one token a sequence: token b is
    sequence b's, and row b of the logits is wanted. So T = R = B, and two inputs are gone.

    Before::

        paged_attention_0: f32[T, 4, 8] = paged_attention(q, k, v, block_tables, seq_lens,
                                                          query_start)
        embedding_0: f32[R, 8] = embedding(x, logits_indices)
        rms_norm_0: f32[R, 8] = rms_norm(embedding_0, w, eps=1e-06)

    After::

        paged_attention_0: f32[B, 4, 8] = paged_attention(q, k, v, block_tables, seq_lens, None)
        rms_norm_0: f32[B, 8] = rms_norm(x, w, eps=1e-06)
    """
    known = _ROWS if page_size is None else {**_ROWS, "P": page_size}
    values: dict[Node, Node | None] = {}
    for node in graph.nodes:
        values[node] = _restricted(node, values, known)
    inputs = tuple(new for node in graph.inputs if (new := values[node]) is not None)
    outputs = tuple(new for node in graph.outputs if (new := values[node]) is not None)
    return Graph(graph.name, inputs, outputs, graph.weights, graph.output_names)


def _restricted(
    node: Node, values: dict[Node, Node | None], known: Mapping[str, Size]
) -> Node | None:
    """The node over B rows; None for an input that is gone."""
    if node.op == "input":
        if input_name(node) in _DROPPED:
            return None
        sizes = tuple(substitute(size, known) for size in node.shape)
        return input_node(input_name(node), TensorType(node.dtype, sizes))
    args = [None if arg is None else values[arg] for arg in node.args]
    if picks_rows(node):
        return args[0]
    # Any other reader of what is gone would lose an operand that it needs, and make refuse it.
    return make(node.op, *args, **{name: substituted(value, known) for name, value in node.attrs})


def takes_one_token(graph: Graph) -> bool:
    """Whether ``one_token`` can restrict a graph: nothing but attention asks where sequences start,
    nothing but a pick of rows asks which logits are wanted, and no nested graph has ragged rows.
    """
    for node in graph.inputs:
        if input_name(node) in _DROPPED and node in graph.outputs:
            return False
        readers = graph.users[node]
        if input_name(node) == "query_start":
            if any(r.op not in _OVER_PAGES or r.args[5] is not node for r in readers):
                return False
        elif input_name(node) == "logits_indices" and any(
            not picks_rows(reader) for reader in readers
        ):
            return False
    nested = [value for node in graph.nodes for _, value in node.attrs if isinstance(value, Graph)]
    return not any(set(_ROWS) & inner.symbols for inner in nested)


def each_by_itself(before: Graph, after: Graph, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """Every token of the step as a sequence of its own that ends with it, over the same pages: they
    are all written before any is read.
    """
    given = {input_name(node): tensor for node, tensor in zip(before.inputs, inputs, strict=True)}
    counts = given["query_start"].diff()
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    changed = {
        "seq_lens": (given["positions"] + 1).to(torch.int32),
        "block_tables": given["block_tables"][sequence],
    }
    return tuple({**given, **changed}[input_name(node)] for node in after.inputs)


def one_token_pass(page_size: int | None) -> Pass:
    """``one_token`` for caches of pages of that size."""
    return Pass("one_token", partial(one_token, page_size=page_size), each_by_itself)
