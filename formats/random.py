"""A checkpoint without files: each tensor is drawn from a seed, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import unknown_tensor
from .made import Full, Random, derived_seed
from .weight_base import Weight


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor of a random checkpoint; `weight` is the expression that makes it."""

    name: str
    weight: Random

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.weight.dtype

    def load(self) -> torch.Tensor:
        """Draw the numbers."""
        return self.weight.load()


class RandomCheckpoint:
    """Normally distributed tensors of given names and shapes, to try models without their files.

    Args:
        tensors: shape and floating-point dtype of each name.
        seed: a different seed gives different numbers; each tensor's own seed also hashes its name,
            so that its numbers do not depend on what else the checkpoint holds.
        std: standard deviation.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        seed: int = 0,
        std: float = 0.02,
    ) -> None:
        self._tensors = {
            name: RandomTensor(name, Random(derived_seed(seed, name), shape, dtype, std))
            for name, (shape, dtype) in tensors.items()
        }
        self._metadata: dict[str, object] = {"seed": seed, "std": std}

    @property
    def metadata(self) -> Mapping[str, object]:
        """The seed and the standard deviation."""
        return self._metadata

    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> RandomTensor:
        """One tensor by name; an unknown one raises CheckpointError."""
        if name not in self._tensors:
            raise unknown_tensor(name, self.names(), "random checkpoint")
        return self._tensors[name]

    def files(self) -> tuple[Path, ...]:
        """No files."""
        return ()


def parameter_weight(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, std: float = 0.02
) -> Weight:
    """What a parameter of a model without a checkpoint is made of.

    Args:
        name: of the parameter; its numbers depend on it and on the seed alone.
        shape: its sizes.
        dtype: its dtype.
        seed: of the whole model.
        std: standard deviation of what is random.

    Returns:
        Ones for a vector that scales (a norm's weight), zeros for integers and flags, and random
        numbers for all else.
    """
    if not dtype.is_floating_point:
        return Full(0, shape, dtype)
    if len(shape) == 1 and name.endswith("weight"):
        return Full(1.0, shape, dtype)
    return Random(derived_seed(seed, name), shape, dtype, std)
