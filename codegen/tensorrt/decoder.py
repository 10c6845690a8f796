"""A decoder over slots as one TensorRT network: ids and positions in, logits out, caches in and
out.

Inputs::

    input_ids       i64[batch, length]   new tokens of each sequence, padded at the end
    position_ids    i64[batch, length]   their positions: consecutive in each row
    logits_indices  i64[batch, rows]     which of the new tokens logits are wanted of
    past_key_values.N.key, .value        [batch, KV heads, cache_length, head dim], zeros at first

Outputs: ``logits`` [batch, rows, vocabulary] and ``present.N.key``, ``.value``, which must be the
memory of their pasts. A token is written at its position and sees the positions up to its own: what
padding left behind is overwritten before anything sees it. A row without a token is given any token
at the next position of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UnsupportedError
from ...ir.dtypes import DType
from ...ir.graph import Graph, input_name
from ...ir.node import Node
from ..constants import is_constant
from ..decoder import Cache, caches_of, names_of
from . import attention, elementwise, linears, norms, shapes
from .network import Network, Tensor
from .writer import Converter, Refusal, Writer

CONVERTERS: dict[str, Converter] = {
    **elementwise.CONVERTERS,
    **shapes.CONVERTERS,
    **norms.CONVERTERS,
    **linears.CONVERTERS,
    **attention.CONVERTERS,
}
"""What becomes a layer, by op."""
_INPUTS = {
    "token_ids": ("input_ids", "length"),
    "positions": ("position_ids", "length"),
    "logits_indices": ("logits_indices", "rows"),
}


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
    w = Writer(graph, names_of(graph, layers, olds), CONVERTERS, max_model_len)
    _read_inputs(w, olds)
    refused: dict[Node, Refusal] = {}
    taken = 0
    for node in graph.nodes:
        if node.op in ("input", "item") or is_constant(node):
            continue
        refusal = w.emit(node)
        if refusal is None:
            taken += 1
        else:
            refused[node] = refusal
    if refused:
        raise _boundary(refused, layers, taken)
    logits, *news = graph.outputs
    outputs = {"logits": w.value(logits)}
    presents = zip(olds.values(), news, strict=True)
    outputs |= {cache.present: w.value(new) for cache, new in presents}
    return Lowered(w.parts.network(outputs), tuple(olds.values()))


def _read_inputs(w: Writer, caches: Mapping[Node, Cache]) -> None:
    """Enters the values that come from outside; lengths follow from positions."""
    for name, symbol in _INPUTS.values():
        w.parts.inputs.append(Tensor(w.parts.unique(name), DType.I64, ("batch", symbol)))
    for node in w.graph.inputs:
        name = input_name(node)
        if name in _INPUTS:
            w.values[node] = (_INPUTS[name][0],)
        elif node in caches:
            cache = caches[node]
            shape = ("batch", cache.heads, w.max_len, cache.width)
            w.parts.inputs.append(Tensor(w.parts.unique(cache.past), cache.dtype, shape))
            w.values[node] = (cache.past,)
    for name in ("logits", *(cache.present for cache in caches.values())):
        w.parts.unique(name)


def _boundary(
    refused: Mapping[Node, Refusal], layers: Mapping[Node, str], taken: int
) -> UnsupportedError:
    """Where TensorRT's part of the model would end."""
    kinds: dict[tuple[str, str], list[Node]] = {}
    for node, refusal in refused.items():
        kinds.setdefault((node.op, refusal.reason), []).append(node)
    told = []
    for (op, reason), nodes in kinds.items():
        place = f" in {layers[nodes[0]]}" if nodes[0] in layers else ""
        others = f", and {len(nodes) - 1} like it" if len(nodes) > 1 else ""
        told.append(f"{op}{place} ({reason}{others})")
    node = next(iter(refused))
    return UnsupportedError(
        f"op {node.op}: {', '.join(map(str, node.types))}",
        expected="ops that TensorRT has layers for",
        found=f"{taken} such ops, and outside of TensorRT: {'; '.join(told)}",
        remedy="Leave --emit out: an engine folder runs them all; or use --emit onnx.",
    )
