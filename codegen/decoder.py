"""What the exporters of a decoder over slots have in common: its caches, the names of its values,
and what is computed from its weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..ir.dtypes import DType
from ..ir.graph import Graph, input_name, param_name
from ..ir.interpreter import interpret
from ..ir.node import Node
from ..ir.printer import value_names
from .constants import closed_graph


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache of an exported model.

    Attributes:
        past, present: names of the input and the output.
        heads, width: KV heads and head dim: the shape is [batch, heads, cache_length, width].
        dtype: its element type.
    """

    past: str
    present: str
    heads: int
    width: int
    dtype: DType


def caches_of(graph: Graph) -> dict[Node, Cache]:
    """The caches of a graph over slots, by the input that brings the old one, in order."""
    found = {}
    for node in graph.inputs:
        kind, _, layer = input_name(node).partition("_cache_")
        if layer:
            part = {"k": "key", "v": "value"}[kind]
            _, heads, _, width = node.shape
            assert isinstance(heads, int) and isinstance(width, int)
            names = (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
            found[node] = Cache(*names, heads, width, node.dtype)
    return found


def names_of(
    graph: Graph, layers: Mapping[Node, str], caches: Mapping[Node, Cache]
) -> dict[Node, str]:
    """Names by value: weights by their own, all else under its layer."""
    names = dict(value_names(graph))
    for node, name in names.items():
        if node.op == "param":
            names[node] = param_name(node)
        elif node in layers:
            names[node] = f"{layers[node]}/{name}"
    names.update((node, cache.past) for node, cache in caches.items())
    return names


def computed(node: Node, graph: Graph) -> torch.Tensor:
    """A weight of the graph, loaded, or what is computed from nothing but weights."""
    if node.op == "param":
        return graph.weights[param_name(node)].load()
    body, names = closed_graph("folded", (node,))
    with torch.inference_mode():
        (value,) = interpret(body, [graph.weights[name].load() for name in names])
    return value
