"""Asks, before a node goes into a model, whether it has an ONNX form and ONNX Runtime a kernel for it."""

from __future__ import annotations

from ...ir.build import item
from ...ir.graph import Graph
from ...ir.node import Node
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
    """The value of a constant operand, which may decide."""
    return node.attr("value") if node is not None and node.op == "const" else None


def _try(node: Node) -> Refusal | None:
    from ...ir.build import input_node

    symbols = sorted({s for n in (node, *node.operands) for t in n.types for s in t.symbols})
    binders = _binders(node, set(symbols))
    e = Emitter(Graph("probe", binders, ()), {}, (), CONVERTERS.get)
    refusal = e.emit(node)
    if refusal is not None:
        return refusal
    count = len(node.types)
    results = [node] if count == 1 else [item(node, i) for i in range(count)]
    model = assemble_model(
        e, {f"result_{i}": result for i, result in enumerate(results)}, folded_as_inputs=True
    )
    del input_node
    return _session_refusal(model.proto.SerializeToString())


def _binders(node: Node, symbols: set[str]) -> tuple[Node, ...]:
    """Inputs that bind the symbols that a node mentions."""
    from ...ir.build import input_node
    from ...ir.dims import symbol
    from ...ir.dtypes import DType
    from ...ir.types import TensorType

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
    except Exception as error:  # noqa: BLE001  its exception types derive from nothing closer
        return Refusal(f"onnxruntime {ort.__version__}: {str(error).splitlines()[0][:160]}")
    return None
