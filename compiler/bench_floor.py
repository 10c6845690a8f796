"""The floor of decode and prefill: the model's matmuls alone, in onnxruntime, of its shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..ir.dims import evaluate
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.printer import attr_graphs

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Linear:
    """One matmul of the model: x [rows, k] times weight [n, k] transposed."""

    rows: int
    n: int
    k: int


class MatmulFloor:
    """A session that runs only the linears of a graph, one after the other.

    Args:
        graph: a final graph; linears within fused bodies count too.
        sizes: values of its symbols for one step.
        threads: intra-op threads.
    """

    def __init__(self, graph: Graph, sizes: Mapping[str, int], threads: int) -> None:
        import onnxruntime

        self.linears = find_linears(graph, sizes)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(one.n, one.k, generator=generator) for one in self.linears]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Beside the model, not in it: protobuf ends at 2 GB.
        names = [f"w{i}" for i in range(len(weights))]
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in weights]
        options.add_external_initializers(names, self._values)
        self.session = onnxruntime.InferenceSession(
            _model(self.linears).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {
            _input(one): torch.randn(one.rows, one.k, generator=generator).numpy()
            for one in self.linears
        }

    def seconds(self, repeat: int) -> float:
        """The median time of one step."""
        run: Callable[[], object] = lambda: self.session.run(None, self.inputs)  # noqa: E731
        run()
        times = []
        for _ in range(repeat):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def find_linears(graph: Graph, sizes: Mapping[str, int]) -> list[Linear]:
    """Every linear of a graph with 2-dimensional operands, those of nested bodies once a call."""
    return [
        Linear(evaluate(x.type.numel, sizes) // evaluate(weight.shape[1], sizes), n, k)
        for x, weight in (node.operands[:2] for node in _linear_nodes(graph))
        for n, k in [(evaluate(weight.shape[0], sizes), evaluate(weight.shape[1], sizes))]
    ]


def _linear_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.calls():
        if node.op == "linear":
            yield node
        for body in attr_graphs(node):
            yield from _linear_nodes(body)


def _input(one: Linear) -> str:
    return f"x{one.rows}_{one.k}"


def _model(linears: list[Linear]) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    nodes, inputs, outputs, initializers = [], {}, [], []
    for index, one in enumerate(linears):
        x, y = _input(one), f"y{index}"
        inputs[x] = helper.make_tensor_value_info(x, TensorProto.FLOAT, [one.rows, one.k])
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, [one.rows, one.n]))
        nodes.append(helper.make_node("Gemm", [x, f"w{index}"], [y], transB=1))
        weight = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[one.n, one.k])
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="beside")
        initializers.append(weight)
    graph = helper.make_graph(nodes, "matmuls", list(inputs.values()), outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
