"""Asks, before a node goes into a model, whether ONNX Runtime can compute it."""

from __future__ import annotations

from collections.abc import Collection

from ...ir.build import input_node, item
from ...ir.dims import symbol
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.types import TensorType
from ..constants import symbols_in
from .emitter import Emitter, Refusal
from .model import assemble_model
from .table import CONVERTERS


class Probe:
    """Remembers its answers: equal calls of equal types get the same one."""

    def __init__(self) -> None:
        self.answers: dict[tuple[object, ...], Refusal | None] = {}

    def __call__(self, node: Node) -> Refusal | None:
        """Why a node cannot go into a model, None when it can."""
        types = tuple((None if a is None else a.value_type, _value(a)) for a in node.args)
        key = (node.op, types, node.attrs)
        if key not in self.answers:
            self.answers[key] = _try(node)
        return self.answers[key]


def _value(node: Node | None) -> object:
    """What may decide beside the type: a constant's value, what a weight is dequantized from."""
    if node is not None and node.op == "dequantize":
        return node.attrs, tuple(None if arg is None else arg.type for arg in node.args)
    return node.attr("value") if node is not None and node.op == "const" else None


def _try(node: Node) -> Refusal | None:
    types = (t for n in (node, *node.operands) for t in n.types)
    symbols = {s for t in types for s in t.symbols} | symbols_in(tuple(v for _, v in node.attrs))
    e = Emitter(Graph("probe", _binders(symbols), ()), {}, (), CONVERTERS.get)
    refusal = e.emit(node)
    if refusal is not None:
        return refusal
    count = len(node.types)
    results = [node] if count == 1 else [item(node, i) for i in range(count)]
    model = assemble_model(
        e, {f"result_{i}": result for i, result in enumerate(results)}, folded_as_inputs=True
    )
    return _session_refusal(model.proto.SerializeToString())


def _binders(symbols: Collection[str]) -> tuple[Node, ...]:
    """Inputs that bind the symbols that a node mentions."""
    shape = tuple(symbol(name) for name in sorted(symbols))
    return (input_node("sizes", TensorType(DType.F32, shape)),)


def _session_refusal(model: bytes) -> Refusal | None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions derive from nothing closer
        return Refusal(f"onnxruntime {ort.__version__}: {str(error).splitlines()[0][:160]}")
    return None
