"""What an ONNX file says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ...formats.weights import Weight

Attribute: TypeAlias = "int | float | str | torch.Tensor | tuple[int, ...] | tuple[float, ...]"


@dataclass(frozen=True, slots=True)
class Step:
    """One node.

    Attributes:
        op, domain, version: which operator, of which version of its domain's operator set.
        name: for messages.
        inputs, outputs: names of values, '' for those that are left out.
        attributes: by name, those that the file gives.
    """

    op: str
    domain: str
    version: int
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.domain and self.domain + '.'}{self.op})"


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that the graph takes.

    Attributes:
        name, dtype: of the tensor.
        dims: a number, the name of a symbol, or '' for a size that the file leaves open.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(str(dim or '?') for dim in self.dims)}]"


@dataclass(frozen=True, slots=True)
class Model:
    """A checked graph.

    Attributes:
        path: of the file, for messages.
        inputs, outputs: what goes in, and the names of what comes out.
        steps: in an order in which each runs.
        constants: small tensors by name, known while the graph is traced.
        weights: all other tensors of the file by name.
    """

    path: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    constants: Mapping[str, torch.Tensor]
    weights: Mapping[str, Weight]
