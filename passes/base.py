"""What a pass is: a named pure function from graph to graph, and how its result compares with what
it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..ir.graph import Graph

Tensors: TypeAlias = Sequence[torch.Tensor]
# (before, after, inputs of before) -> inputs of after
AdaptInputs: TypeAlias = Callable[[Graph, Graph, Tensors], tuple[torch.Tensor, ...]]
# (before, after) -> what after must agree with, over the inputs of before
Expected: TypeAlias = Callable[[Graph, Graph], Graph]
# outputs of after -> what must equal the outputs of before
AdaptOutputs: TypeAlias = Callable[[Graph, Tensors, Tensors], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Pass:
    """One rewrite of the pipeline.

    Attributes:
        name: as shown in reports, dumps and ``graphs/NNN-<name>.txt``.
        run: the rewrite; its docstring shows a graph before and after.
        adapt_inputs: for passes that change the signature: inputs for the new graph that mean the
            same.
        adapt_outputs: the new graph's outputs, arranged as the old one's: (after, inputs of after,
            outputs of after).
        expected: for passes that change numbers on purpose: another graph over the inputs of the
            old one, that the new one must agree with.
    """

    name: str
    run: Callable[[Graph], Graph]
    adapt_inputs: AdaptInputs | None = None
    adapt_outputs: AdaptOutputs | None = None
    expected: Expected | None = None
