"""A decoder over slots as one ONNX model that stock runtimes take: ids and positions in, logits
out, caches in and out.

Inputs::

    input_ids       i64[batch, length]   new tokens of each sequence, padded at the end
    position_ids    i64[batch, length]   their positions: consecutive in each row
    logits_indices  i64[batch, rows]     which of the new tokens logits are wanted of
    past_key_values.N.key, .value        [batch, KV heads, cache_length, head dim], zeros at first

Outputs: ``logits`` [batch, rows, vocabulary] and ``present.N.key``, ``.value``, shaped as their
pasts, which may be the same memory. A token is written at its position and sees the positions up
to its own: what padding left behind is overwritten before anything sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UnsupportedError
from ...ir.build import input_node
from ...ir.dims import Dim, symbol
from ...ir.dtypes import DType
from ...ir.graph import Graph, input_name
from ...ir.node import Node
from ...ir.types import TensorType
from ..constants import is_constant
from ..decoder import Cache, caches_of, computed, names_of
from .attention import iota
from .emitter import ELEMENT_TYPES, STORED_TYPES, Converter, Emitter, Refusal, Shared
from .model import OPSET, Model, assemble_model

if TYPE_CHECKING:
    import onnx_ir
    from onnx import ModelProto, NodeProto

_SIZES = {"B": "batch", "S": "length", "R": "rows", "L": "cache_length"}
_B, _S, _R = map(symbol, "BSR")
_I64 = DType.I64


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX model of a causal LM, its weights still to be loaded.

    Attributes:
        model: whose initializers load as they are written.
        caches: in the order of the inputs.
        notes: what a user may want to know of the conversion.
    """

    model: onnx_ir.Model
    caches: tuple[Cache, ...]
    notes: tuple[str, ...]


def export_decoder(
    graph: Graph,
    converters: Mapping[str, Converter],
    layers: Mapping[Node, str],
    max_model_len: int,
) -> Exported:
    """The model of a graph over slots.

    Args:
        graph: as ``insert_slot_cache`` leaves it, and the passes behind it.
        converters: of a flavor.
        layers: the layer of each node that has one, for the names and metadata of its ONNX nodes.
        max_model_len: longest sequence in tokens; tables over positions are as long.

    Raises:
        UnsupportedError: a node has no ONNX form; it is named.
    """
    olds = caches_of(graph)
    caches = tuple(olds.values())
    names = names_of(graph, layers, olds)
    shared = Shared(types=STORED_TYPES)
    e = Emitter(graph, names, graph.nodes, converters.get, max_model_len, shared)
    e.shared.taken.update(("logits", *(name for c in caches for name in (c.past, c.present))))
    _read_inputs(e, graph)
    for node in graph.nodes:
        if node.op in ("input", "const", "item") or node in e.values or is_constant(node):
            continue
        start = len(e.nodes)
        refusal = e.emit(node)
        if refusal is not None:
            raise _refused(node, refusal, layers.get(node, ""))
        for proto in e.nodes[start:]:
            _tell(proto, {"layer": layers.get(node, ""), "op": node.op})
    outputs = _outputs(e, graph, caches)
    _rename(e, outputs)
    model = assemble_model(e, outputs)
    _name_sizes(model.proto)
    return Exported(_with_weights(model, graph), caches, model.notes)


def _read_inputs(e: Emitter, graph: Graph) -> None:
    """The values that the slot graph takes, from those that a user has."""
    ids, positions, wanted = (
        _declare(e, name, sizes)
        for name, sizes in (
            ("input_ids", (_B, _S)),
            ("position_ids", (_B, _S)),
            ("logits_indices", (_B, _R)),
        )
    )
    flat = e.ints(-1)
    last = e.op("Gather", positions, e.scalar(-1, _I64), axis=1)
    lengths = e.op("Cast", e.op("Add", last, e.scalar(1, _I64)), to=ELEMENT_TYPES[DType.I32])
    batch, length = e.op("Shape", ids, start=0, end=1), e.op("Shape", ids, start=1, end=2)
    first = e.op("Unsqueeze", e.op("Mul", iota(e, e.ints(0), batch), length), e.ints(1))
    values = {
        "token_ids": e.op("Reshape", ids, flat),
        "positions": e.op("Reshape", positions, flat),
        "seq_lens": lengths,
        "logits_indices": e.op("Reshape", e.op("Add", wanted, first), flat),
    }
    for node in graph.inputs:
        if input_name(node) in values:
            e.values[node] = (values[input_name(node)],)
        else:
            e.shared.leaves[node] = e.names[node]


def _declare(e: Emitter, name: str, sizes: tuple[Dim, ...]) -> str:
    node = input_node(name, TensorType(_I64, sizes))
    e.shared.taken.add(name)
    e.shared.leaves[node] = name
    return name


def _outputs(e: Emitter, graph: Graph, caches: tuple[Cache, ...]) -> dict[str, Node]:
    logits, *news = graph.outputs
    vocabulary = logits.shape[1]
    shape = TensorType(logits.dtype, (_B, _R, vocabulary))
    rows = e.op("Shape", "logits_indices")
    e.stem = "logits"
    target = e.op("Concat", rows, e.ints(-1), axis=0)
    result = input_node("logits", shape)
    e.values[result] = (e.op("Reshape", e.value(logits), target),)
    presents = {cache.present: new for cache, new in zip(caches, news, strict=True)}
    return {"logits": result, **presents}


def _rename(e: Emitter, outputs: Mapping[str, Node]) -> None:
    """Gives outputs their names where they are made: an Identity would copy each cache, and keep
    what comes before it from writing in place.
    """
    new = {e.value(node): name for name, node in outputs.items()}
    for proto in e.nodes:
        proto.input[:] = [new.get(name, name) for name in proto.input]
        proto.output[:] = [new.get(name, name) for name in proto.output]
    for name, node in outputs.items():
        made = node.operands[0] if node.op == "item" else node
        e.values[made] = tuple(new.get(value, value) for value in e.values[made])
        assert e.value(node) == name


def _name_sizes(proto: ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _SIZES.get(dim.dim_param, dim.dim_param)


def _tell(proto: NodeProto, facts: Mapping[str, str]) -> None:
    for key, value in facts.items():
        if value:
            proto.metadata_props.add(key=f"tilewright.{key}", value=value)


def _with_weights(model: Model, graph: Graph) -> onnx_ir.Model:
    """The model with initializers that are loaded, or computed, when they are written."""
    import onnx_ir
    from onnx_ir import tensor_adapters

    found = onnx_ir.from_proto(model.proto)
    initializers = found.graph.initializers

    def tensor_of(name: str, node: Node) -> onnx_ir.LazyTensor:
        declared = initializers[name].const_value
        assert declared is not None
        dtype, shape = declared.dtype, declared.shape

        def load() -> onnx_ir.TensorProtocol:
            value = computed(node, graph).contiguous()
            if dtype is onnx_ir.DataType.UINT4:
                return onnx_ir.PackedTensor(value.flatten().numpy(), dtype, shape=shape, name=name)
            return tensor_adapters.TorchTensor(value, name)

        return onnx_ir.LazyTensor(load, dtype=dtype, shape=shape, name=name)

    for name, node in model.folded.items():
        initializers[name].const_value = tensor_of(name, node)
    return found


def _refused(node: Node, refusal: Refusal, layer: str) -> UnsupportedError:
    place = f" in {layer}" if layer else ""
    return UnsupportedError(
        f"op {node.op}{place}: {node.value_type}",
        expected=f"an op that opset {OPSET} of ONNX can express",
        found=refusal.reason,
        remedy="Leave --emit out: an engine folder runs it, by torch where nothing else does.",
    )
