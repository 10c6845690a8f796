"""A decoder over slots as one TensorRT network: ids and positions in, logits out, caches in and
out.

Inputs::

    input_ids       i64[batch, length]   new tokens of each sequence, padded at the end
    position_ids    i64[batch, length]   their positions: consecutive in each row
    logits_indices  i64[rows]            which of the new tokens logits are wanted of, counted
                                         through all rows of the batch
    past_key_values.N.key, .value        [batch, KV heads, cache_length, head dim], zeros at first

Outputs: ``logits`` [rows, vocabulary] and ``present.N.key``, ``.value``, which must be the
memory of their pasts. A token is written at its position and sees the positions up to its own: what
padding left behind is overwritten before anything sees it. A first position and the length are
together at most the cache's length. A row without a token is given any token at the next position
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UnsupportedError
from ...ir.graph import Graph
from ...ir.node import Node
from ..constants import is_constant
from ..decoder import Cache, caches_of, names_of
from .network import Network
from .regions import lower_region, refusals
from .writer import Refusal


@dataclass(frozen=True, slots=True)
class Lowered:
    """A decoder's network.

    Attributes:
        network: over slots.
        caches: in the order of the inputs.
    """

    network: Network
    caches: tuple[Cache, ...]


def lower_decoder(graph: Graph, layers: Mapping[Node, str], max_model_len: int) -> Lowered:
    """The network of a graph over slots.

    Args:
        graph: as ``insert_slot_cache`` leaves it, and the passes behind it.
        layers: the layer of each node that has one, for the names of the network's values.
        max_model_len: longest sequence in tokens; caches and tables over positions are as long.

    Raises:
        UnsupportedError: nodes have no form in TensorRT; it says which, and what would go.
    """
    olds = caches_of(graph)
    names = names_of(graph, layers, olds)
    refused = refusals(graph, names, max_model_len)
    if refused:
        raise _boundary(graph, refused, layers)
    logits, *news = graph.outputs
    presents = zip(olds.values(), news, strict=True)
    outputs = {"logits": logits, **{cache.present: new for cache, new in presents}}
    piece = lower_region(graph, graph.nodes, outputs, names, max_model_len)
    return Lowered(piece.network, tuple(olds.values()))


def told(refused: Mapping[Node, Refusal], layers: Mapping[Node, str]) -> tuple[str, ...]:
    """What stays outside of TensorRT: each op once, where it is first, why, and how often."""
    kinds: dict[tuple[str, str], list[Node]] = {}
    for node, refusal in refused.items():
        kinds.setdefault((node.op, refusal.reason), []).append(node)
    found = []
    for (op, reason), nodes in kinds.items():
        place = f" in {layers[nodes[0]]}" if nodes[0] in layers else ""
        others = f", and {len(nodes) - 1} like it" if len(nodes) > 1 else ""
        found.append(f"{op}{place} ({reason}{others})")
    return tuple(found)


def _boundary(
    graph: Graph, refused: Mapping[Node, Refusal], layers: Mapping[Node, str]
) -> UnsupportedError:
    """Where TensorRT's part of the model would end."""
    node = next(iter(refused))
    calls = [n for n in graph.nodes if n.op not in ("input", "item") and not is_constant(n)]
    return UnsupportedError(
        f"op {node.op}: {', '.join(map(str, node.types))}",
        expected="ops that TensorRT has layers for",
        found=f"{len(calls) - len(refused)} such ops, and outside of TensorRT: "
        f"{'; '.join(told(refused, layers))}",
        remedy="Use --backend tensorrt in place of --emit, whose engine folder leaves those to "
        "torch; or --emit onnx.",
    )
