"""What a weight expression is, and the place where it is evaluated: the host, or a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch


class Placement:
    """Where weights are evaluated. This one is the host; devices have placements of their own.

    Attributes:
        device: where tensors are brought to.
    """

    device: torch.device = torch.device("cpu")

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on `device`; it may be the same one."""
        return tensor

    def fill(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write a tensor of the host into `out`, which has its shape and lies on `device`.

        The values are cast to the dtype of `out`. They are sure to be there when `scope` ends.
        """
        out.copy_(tensor)

    def scope(self) -> AbstractContextManager[object]:
        """What one thread does with this placement happens inside."""
        return nullcontext()


HOST = Placement()
"""Evaluation on the CPU."""


class Weight:
    """Base of all weight expressions.

    Attributes:
        shape: sizes of the loaded tensor.
        dtype: torch dtype of the loaded tensor.
    """

    __slots__ = ()
    shape: tuple[int, ...]
    dtype: torch.dtype

    def value(self, place: Placement = HOST) -> torch.Tensor:
        """Evaluate to a tensor on `place` that may alias a checkpoint and have any strides."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def write(self, out: torch.Tensor, place: Placement = HOST) -> None:
        """Evaluate into `out`, a tensor of `shape` on `place`; values are cast to its dtype."""
        out.copy_(self.value(place))

    def pieces(self, out: torch.Tensor) -> Iterator[tuple[Weight, torch.Tensor]]:
        """Cut the work of `write` into expressions and regions of `out` that need no order.

        Args:
            out: of `shape`; what the pieces write into it is what `write` would.
        """
        yield self, out

    def load(self) -> torch.Tensor:
        """Evaluate to a contiguous CPU tensor of `shape` and `dtype`.

        It may alias a checkpoint's memory: do not write to it.
        """
        return self.value().contiguous()


class Leaf(Weight):
    """A weight that is read or made on the host, whole."""

    __slots__ = ()

    def read(self) -> torch.Tensor:
        """The tensor on the CPU; it may alias a checkpoint."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def value(self, place: Placement = HOST) -> torch.Tensor:
        """Read it, and bring it to `place`."""
        return place.bring(self.read())

    def write(self, out: torch.Tensor, place: Placement = HOST) -> None:
        """Read it into `out`."""
        place.fill(out, self.read())
