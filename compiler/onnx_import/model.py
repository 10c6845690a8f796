"""What an ONNX file says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import torch

from ...errors import UnsupportedError
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

    def integer(self, name: str, default: int | None = None) -> int:
        """An attribute of type INT; without a default it must be there.

        Raises:
            UnsupportedError: it is missing, or of another type.
        """
        found = self.attributes.get(name, default)
        return found if isinstance(found, int) else self._misfit(name, "an integer", found)

    def number(self, name: str, default: float) -> float:
        """An attribute of type FLOAT; raises as `integer`."""
        found = self.attributes.get(name, default)
        return found if isinstance(found, int | float) else self._misfit(name, "a number", found)

    def integers(self, name: str) -> list[int] | None:
        """An attribute of type INTS, None where it is left out; raises as `integer`."""
        found = self.attributes.get(name)
        if found is None:
            return None
        if not isinstance(found, tuple):
            self._misfit(name, "integers", found)
        items = [item for item in found if isinstance(item, int)]
        return items if len(items) == len(found) else self._misfit(name, "integers", found)

    def _misfit(self, name: str, expected: str, found: object) -> NoReturn:
        raise UnsupportedError(
            str(self),
            expected=f"{expected} as {name!r}",
            found="nothing" if found is None else str(found)[:80],
            remedy="Export the model again, by a tool that writes what the op is defined to have.",
        )


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
