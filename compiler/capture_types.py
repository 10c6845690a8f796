"""What capture hands to lowering: the exported program and its interface as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..runtime.structure import Structure

Route = Literal["hook", "masks", "plain"]


@dataclass(frozen=True, slots=True)
class CapturedInput:
    """One tensor given at each call.

    Attributes:
        name: of the placeholder node.
        path: where the tensor stands in the call, e.g. ``input_ids`` or ``args[0]['mask']``.
        fake: FakeTensor with shape (symbolic where dynamic), dtype and strides.
        dims: per dimension the symbol's name, or its fixed size.
    """

    name: str
    path: str
    fake: Tensor
    dims: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dynamic size: ``lower <= size <= upper``; upper is None when unlimited."""

    name: str
    lower: int
    upper: int | None


@dataclass(frozen=True, slots=True)
class Captured:
    """A module as a functional fx graph of ATen and `tilewright::` ops.

    Attributes:
        name: class name of the module.
        program: the cleaned ExportedProgram; weights and inputs are placeholders of its graph.
        inputs: the tensors of a call, in placeholder order.
        weight_of: placeholder name → weight name, for placeholders that are used. Tied weights
            have one name: the first.
        weights: weight name → tensor, for those that are used; on the meta device when the
            module's own weights were.
        call: structure of the call, the pair (positional, keyword arguments), over `inputs`.
        arguments: names of forward()'s positional parameters, to bind keywords.
        output: structure of the result over the graph's flat outputs.
        symbols: the dynamic sizes by name.
        route: how attention was captured, see `hf_model.capture_causal_lm`.
        notes: what a report should tell.
    """

    name: str
    program: ExportedProgram
    inputs: tuple[CapturedInput, ...]
    weight_of: Mapping[str, str]
    weights: Mapping[str, Tensor]
    call: Structure
    arguments: tuple[str, ...]
    output: Structure
    symbols: tuple[Symbol, ...]
    route: Route
    notes: tuple[str, ...]

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph with its weights lifted to placeholders."""
        module: fx.GraphModule = self.program.graph_module
        return module

    def run(
        self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Flat outputs of the graph, run node by node; `inputs` ordered as `self.inputs`.

        Args:
            weights: by weight name; the captured ones when None.
        """
        held = self.weights if weights is None else weights
        given = {entry.name: tensor for entry, tensor in zip(self.inputs, inputs, strict=True)}
        given |= {name: held[weight] for name, weight in self.weight_of.items()}
        arguments = [
            given.get(node.name) for node in self.graph_module.graph.find_nodes(op="placeholder")
        ]
        with torch.no_grad():
            return list(
                fx.Interpreter(self.graph_module).run(*arguments, enable_io_processing=False)
            )
