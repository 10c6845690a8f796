"""Weights that no file holds: random numbers and constants, for shapes without a checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..errors import GraphError
from ..targets import available_cores
from .weight_base import HOST, Leaf, Placement, Weight
from .weight_ops import DTYPES, show_value

CHUNK_ELEMENTS = 1 << 24
"""Elements drawn from one seed: larger tensors are the concatenation of as many draws as it takes,
so that several threads can draw them. The numbers of a seed depend on it."""


@dataclass(frozen=True, slots=True, repr=False)
class Random(Leaf):
    """Normally distributed numbers, the same in every process and for any number of threads.

    They are those of torch's CPU generator, whose last bits are the same on all processors that
    torch uses AVX2 or AVX-512 on.

    Args:
        seed: 0 … 2⁶³ - 1.
        shape: sizes of the tensor.
        dtype: a floating-point dtype; numbers are drawn in float32 and rounded to it.
        std: standard deviation; the mean is 0.
    """

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    std: float = 0.02

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise GraphError(
                "random weight",
                expected="a floating-point dtype",
                found=show_value(self.dtype),
                remedy="Cast the random weight instead.",
            )
        if not (
            0 <= self.seed < 2**63 and math.isfinite(self.std) and min(self.shape, default=0) >= 0
        ):
            raise GraphError(
                "random weight",
                expected="a seed from 0 to 2**63 - 1, a finite std and sizes of at least 0",
                found=str(self),
                remedy="Correct the argument.",
            )

    def read(self) -> torch.Tensor:
        """Draw the numbers."""
        if math.prod(self.shape) > CHUNK_ELEMENTS:
            out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
            with ThreadPoolExecutor(available_cores()) as pool:
                for done in [pool.submit(c.write, region) for c, region in self.pieces(out)]:
                    done.result()
            return out
        generator = torch.Generator("cpu").manual_seed(self.seed)
        numbers = torch.randn(self.shape, generator=generator, device="cpu")
        return numbers.mul_(self.std).to(self.dtype)

    def pieces(self, out: torch.Tensor) -> Iterator[tuple[Weight, torch.Tensor]]:
        """One piece a draw."""
        count = math.prod(self.shape)
        if count <= CHUNK_ELEMENTS or not out.is_contiguous():
            yield self, out
            return
        flat = out.view(-1)
        for index, start in enumerate(range(0, count, CHUNK_ELEMENTS)):
            region = flat[start : start + CHUNK_ELEMENTS]
            seed = derived_seed(self.seed, str(index))
            yield Random(seed, (region.numel(),), self.dtype, self.std), region

    def __str__(self) -> str:
        values = (self.seed, self.shape, self.dtype, self.std)
        return f"random({', '.join(show_value(value) for value in values)})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False)
class Full(Leaf):
    """One number everywhere, e.g. the norm weights of a model without a checkpoint.

    Args:
        fill: the number, not NaN.
        shape: sizes of the tensor.
        dtype: one of `weight_ops.DTYPES`.
    """

    fill: int | float
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self._fits() or min(self.shape, default=0) < 0:
            raise GraphError(
                "constant weight",
                expected="a number that the dtype holds, and sizes of at least 0",
                found=str(self),
                remedy="Correct the argument.",
            )

    def _fits(self) -> bool:
        if type(self.fill) not in (int, float) or self.dtype not in DTYPES.values():
            return False
        if self.dtype.is_floating_point:
            return not math.isnan(self.fill)
        bounds = (0, 1) if self.dtype is torch.bool else _bounds(self.dtype)
        return type(self.fill) is int and bounds[0] <= self.fill <= bounds[1]

    def read(self) -> torch.Tensor:
        """The tensor on the CPU."""
        return torch.full(self.shape, self.fill, dtype=self.dtype, device="cpu")

    def value(self, place: Placement = HOST) -> torch.Tensor:
        """The tensor, made on `place`."""
        return torch.full(self.shape, self.fill, dtype=self.dtype, device=place.device)

    def write(self, out: torch.Tensor, place: Placement = HOST) -> None:
        """Fill `out`, rounded through `dtype`."""
        out.fill_(torch.full((), self.fill, dtype=self.dtype, device="cpu").item())

    def __str__(self) -> str:
        return f"full({', '.join(show_value(v) for v in (self.fill, self.shape, self.dtype))})"

    __repr__ = __str__


def _bounds(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def derived_seed(seed: int, name: str) -> int:
    """A seed of its own for a name, 0 … 2⁶³ - 1, that depends on nothing but the two."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits: what a torch generator takes
