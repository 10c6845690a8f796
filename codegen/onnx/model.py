"""From an emitter's nodes to an ONNX model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ...ir.node import Node
from .emitter import MICROSOFT, Emitter, value_info

OPSET, IR_VERSION = 24, 11
EXTERNAL_FILE = "weights"


@dataclass(frozen=True, slots=True)
class Model:
    """An ONNX model without its weights.

    Attributes:
        proto: the model; ``folded`` is declared as external data, for the loader to give.
        inputs: the IR values that it takes, in order.
        folded: the IR values that it is given when the engine starts, by ONNX name.
        notes: what a user may want to know of the conversion.
    """

    proto: ModelProto
    inputs: tuple[Node, ...]
    folded: Mapping[str, Node]
    notes: tuple[str, ...] = ()


def assemble_model(
    e: Emitter, outputs: Mapping[str, Node], *, folded_as_inputs: bool = False
) -> Model:
    """The model that computes ``outputs`` under their names, less all that they do not need."""
    for wanted, node in outputs.items():
        name = e.value(node)
        if name != wanted:
            e.shared.taken.add(wanted)
            e.add("Identity", (name,), (wanted,))
    nodes = _needed(e.nodes, set(outputs))
    used = names_read(nodes)
    inputs = {name: node for node, name in e.shared.leaves.items() if name in used}
    folded = {name: node for node, name in e.shared.folded.items() if name in used}
    inline = [tensor for name, tensor in e.shared.inline.items() if name in used]
    given = {**inputs, **folded} if folded_as_inputs else inputs
    graph = helper.make_graph(
        nodes,
        e.graph.name,
        [value_info(name, node.type) for name, node in given.items()],
        [value_info(name, node.type) for name, node in outputs.items()],
        inline if folded_as_inputs else [*inline, *(_external(e, n, v) for n, v in folded.items())],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    proto = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tilewright"
    )
    return Model(proto, tuple(inputs.values()), folded, tuple(e.shared.notes))


def _external(e: Emitter, name: str, node: Node) -> TensorProto:
    """A tensor declared, its bytes elsewhere: the loader hands them over in memory."""
    packed = e.shared.four_bits.get(name)
    type_ = e.shared.types[node.dtype] if packed is None else TensorProto.UINT4
    tensor = TensorProto(name=name, data_type=type_)
    tensor.dims.extend(packed or (int(str(size)) for size in node.shape))
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=EXTERNAL_FILE)
    return tensor


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that the outputs need, in order."""
    needed, kept = set(outputs), []
    for proto in reversed(nodes):
        if needed.intersection(proto.output):
            kept.append(proto)
            needed |= names_read([proto])
    return kept[::-1]


def names_read(nodes: Iterable[NodeProto]) -> set[str]:
    """The names that nodes read, those within their branches too."""
    read: set[str] = set()
    for proto in nodes:
        read.update(proto.input)
        for attribute in proto.attribute:
            if attribute.HasField("g"):
                read |= _captured(attribute.g)
    return read - {""}


def _captured(graph: GraphProto) -> set[str]:
    """The names that a branch reads, those of its own results among them."""
    return names_read(graph.node) | {output.name for output in graph.output}
