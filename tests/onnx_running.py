"""Lowers graphs with the ONNX backend, runs them, and sets the results beside the interpreter's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tilewright.codegen.base import Lowered
from tilewright.codegen.onnx.backend import BACKEND
from tilewright.codegen.program import Program
from tilewright.ir.graph import Graph, input_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import Target


@dataclass
class Held:
    """A weight that is at hand."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        return self.tensor


class Running:
    """A graph on the ONNX backend, its Program gone through JSON and back."""

    def __init__(self, graph: Graph, max_model_len: int | None = None) -> None:
        self.graph = verify(graph)
        self.lowered: Lowered = BACKEND.lower(graph, Target.parse("cpu"), max_model_len)
        self.program = Program.from_json(json.loads(json.dumps(self.lowered.program.to_json())))
        self.weights = {name: weight.load() for name, weight in graph.weights.items()}
        self.runner = ProgramRunner(self.program, self.weights, self.lowered.files.__getitem__)

    @property
    def kernels(self) -> list[str]:
        return [call.kernel for call in self.program.calls]

    @property
    def whole(self) -> bool:
        """Whether ONNX Runtime runs all of it, in one call."""
        return self.kernels == ["onnxruntime/onnx/model_0.onnx"]

    def run(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [input_name(node) for node in self.graph.inputs]
        return self.runner.run(dict(zip(names, inputs, strict=True)))

    def check(self, inputs: Sequence[torch.Tensor], tolerance: float = 2e-5) -> None:
        """The results are the interpreter's."""
        wanted = interpret(self.graph, inputs, self.weights)
        found = self.run([x.clone() for x in inputs])
        for name, value in zip(self.graph.output_names, wanted, strict=True):
            torch.testing.assert_close(
                _wide(found[name]), _wide(value), rtol=tolerance, atol=tolerance, equal_nan=True
            )


def running(
    text: str, weights: Mapping[str, torch.Tensor] | None = None, max_model_len: int | None = None
) -> Running:
    """A graph from its text."""
    graph = parse_graph(text)
    held = {name: Held(tensor) for name, tensor in (weights or {}).items()}
    return Running(graph.with_weights(held), max_model_len)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """torch compares 8-bit floats by their bits alone."""
    is_float8 = tensor.is_floating_point() and tensor.itemsize == 1
    return tensor.float() if is_float8 else tensor
