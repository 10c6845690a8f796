"""The floor of decode and prefill: the model's matmuls alone. On a CPU onnxruntime runs them; on a
GPU bytes and FLOPs over the rates that the device has just reached.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...ir.dims import evaluate
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.printer import attr_graphs
from ...runtime.engine import CausalLMEngine
from ..inspect.facts import Setting, bindings, final_graph, kv_bytes_per_token
from .machine import Machine

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Linear:
    """One matmul of the model: x [rows, k] times weight [n, k] transposed.

    Attributes:
        rows, n, k: sizes.
        weight_bytes: that reading the weight takes, as it is stored.
        coded: whether both operands are codes, for which devices have faster units.
    """

    rows: int
    n: int
    k: int
    weight_bytes: int
    coded: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.n * self.k


@dataclass(slots=True)
class Floor:
    """No step can be faster than its matmuls, nor than what it must read.

    Attributes:
        bytes_per_token: that a decode step must read: the weights of its linears, and the KV cache
            of half the new tokens.
        decode, prefill: tokens a second, None where the model has no linear.
    """

    bytes_per_token: int
    decode: float | None
    prefill: float | None

    def measure(self) -> None:
        """Called once in each round of runs."""


def make_floor(
    engine: CausalLMEngine, machine: Machine, prompt_tokens: int, new_tokens: int
) -> Floor:
    """The floor of an engine on the machine that was probed."""
    graph = final_graph(engine.image)
    length = prompt_tokens + new_tokens
    steps = {
        name: bindings(graph, engine.image, Setting(name, tokens, length))
        for name, tokens in (("decode", 1), ("prefill", prompt_tokens))
    }
    linears = find_linears(graph, steps["decode"])
    context = prompt_tokens + new_tokens // 2
    read = sum(one.weight_bytes for one in linears)
    read += kv_bytes_per_token(engine.image) * context
    floor = Floor(read, None, None)
    if linears and machine.matmul_flops_per_second is not None:
        bytes_rate, flops_rate = machine.read_bytes_per_second, machine.matmul_flops_per_second
        coded_rate = machine.fp8_flops_per_second or flops_rate
        floor.decode = bytes_rate / read
        floor.prefill = prompt_tokens / sum(
            max(
                one.flops / (coded_rate if one.coded else flops_rate),
                one.weight_bytes / bytes_rate,
            )
            for one in find_linears(graph, steps["prefill"])
        )
    elif any(one.weight_bytes < one.n * one.k * 2 for one in linears):
        # Matmuls of numbers are none of codes. What is left is reading these.
        floor.decode = machine.read_bytes_per_second / read
    elif linears:
        matmuls = MatmulFloor(graph, steps, machine.threads)
        return MeasuredFloor(read, None, None, matmuls, prompt_tokens)
    return floor


class MatmulFloor:
    """A session that runs only the linears of a graph, one after the other.

    Args:
        graph: a final graph; linears within fused bodies count too.
        steps: values of its symbols by the name of a step ("decode", "prefill").
        threads: intra-op threads.
    """

    def __init__(self, graph: Graph, steps: Mapping[str, Mapping[str, int]], threads: int) -> None:
        import onnxruntime

        linears = {name: find_linears(graph, sizes) for name, sizes in steps.items()}
        # Inputs are shared by all linears of one width whose rows are alike in every step.
        keys = [tuple(each) for each in zip(*linears.values(), strict=True)]
        inputs = [_input(key) for key in keys]
        generator = torch.Generator().manual_seed(0)
        names, shapes = [f"w{i}" for i in range(len(keys))], [(key[0].n, key[0].k) for key in keys]
        weights = [torch.randn(*shape, generator=generator) for shape in shapes]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Beside the model, not in it: protobuf ends at 2 GB.
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in weights]
        options.add_external_initializers(names, self._values)
        self.session = onnxruntime.InferenceSession(
            _model(inputs, shapes).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {
            step: {
                name: torch.randn(one.rows, one.k, generator=generator).numpy()
                for name, one in zip(inputs, each, strict=True)
            }
            for step, each in linears.items()
        }

    def seconds(self, step: str, repeat: int = 1) -> float:
        """Mean time of a step, after one that is not counted."""
        self.session.run(None, self.inputs[step])
        started = time.perf_counter()
        for _ in range(repeat):
            self.session.run(None, self.inputs[step])
        return (time.perf_counter() - started) / repeat


@dataclass(slots=True)
class MeasuredFloor(Floor):
    """A floor that runs in turn with the contenders: medians over the rounds.

    Attributes:
        matmuls: what runs.
        prompt_tokens: rows of its "prefill".
        rounds: (decode, prefill) tokens a second, one pair a round.
    """

    matmuls: MatmulFloor
    prompt_tokens: int
    rounds: list[tuple[float, float]] = field(default_factory=list)

    def measure(self) -> None:
        decode, prefill = self.matmuls.seconds("decode", 16), self.matmuls.seconds("prefill")
        self.rounds.append((1 / decode, self.prompt_tokens / prefill))
        self.decode, self.prefill = map(statistics.median, zip(*self.rounds, strict=True))


def find_linears(graph: Graph, sizes: Mapping[str, int]) -> list[Linear]:
    """Every linear of a graph in its order, those of nested bodies once a call."""
    found = []
    for node in _linear_nodes(graph):
        coded = node.op == "scaled_linear"
        x, weight = node.operands[0], node.operands[2 if coded else 1]
        n, k = (evaluate(size, sizes) for size in weight.shape)
        if coded:
            parts = node.operands[2:4]
        else:
            parts = weight.operands if weight.op == "dequantize" else (weight,)
        size = sum(evaluate(part.type.nbytes, sizes) for part in parts)
        found.append(Linear(evaluate(x.type.numel, sizes) // k, n, k, size, coded))
    return found


def _linear_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.calls():
        if node.op in ("linear", "scaled_linear"):
            yield node
        for body in attr_graphs(node):
            yield from _linear_nodes(body)


def _input(key: Sequence[Linear]) -> str:
    return "_".join(["x", str(key[0].k), *(str(one.rows) for one in key)])


def _model(inputs: Sequence[str], shapes: Sequence[tuple[int, int]]) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    declared, nodes, outputs, initializers = {}, [], [], []
    for index, (x, (n, k)) in enumerate(zip(inputs, shapes, strict=True)):
        y, w = f"y{index}", f"w{index}"
        declared[x] = helper.make_tensor_value_info(x, TensorProto.FLOAT, [f"rows_{x}", k])
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, [f"rows_{x}", n]))
        nodes.append(helper.make_node("Gemm", [x, w], [y], transB=1))
        weight = TensorProto(name=w, data_type=TensorProto.FLOAT, dims=[n, k])
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="beside")
        initializers.append(weight)
    graph = helper.make_graph(nodes, "matmuls", list(declared.values()), outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
