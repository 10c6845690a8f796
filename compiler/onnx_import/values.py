"""Values while a graph is traced: tensors, and what is known of some without computing them.

Sizes of a traced module are symbols, and ONNX computes with sizes by ops over tensors. So a value
may be `Known`, its elements numbers or symbolic sizes; `Counting`, ``start, start + 1, …`` of
symbolic length; or `Filled`, one number in a symbolic shape. Any of them becomes a tensor where an
op needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size: TypeAlias = int
"""Symbolic sizes too: torch's stubs call all sizes int."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A small tensor of numbers and symbolic sizes: ``array`` has dtype object."""

    array: np.ndarray
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        """Its sizes."""
        return self.array.shape

    @property
    def items(self) -> list[Any]:
        """Its elements in row-major order."""
        return list(self.array.reshape(-1))


@dataclass(frozen=True, slots=True, eq=False)
class Counting:
    """``start + arange(length)`` along ``axis`` of ``rank`` axes, the others of size one."""

    start: Size
    length: Size
    rank: int
    axis: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        """Its sizes."""
        return tuple(self.length if axis == self.axis else 1 for axis in range(self.rank))

    def laid(self, rank: int, axis: int) -> Counting:
        """The same numbers along another axis."""
        return replace(self, rank=rank, axis=axis)


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """One number everywhere."""

    number: float | bool
    shape: tuple[Size, ...]
    dtype: torch.dtype


Value: TypeAlias = "Tensor | Known | Counting | Filled"


def known(elements: object, dtype: torch.dtype = torch.int64) -> Known:
    """A Known of a number, a sequence of numbers, or an array of objects."""
    if isinstance(elements, np.ndarray):
        return Known(elements, dtype)
    array = np.empty((len(elements),) if isinstance(elements, Sequence) else (), dtype=object)
    array[...] = elements
    return Known(array, dtype)


def known_tensor(tensor: Tensor) -> Known:
    """A Known of a small constant."""
    array = np.empty(tuple(tensor.shape), dtype=object)
    if tensor.numel():
        array[...] = tensor.tolist()
    return Known(array, tensor.dtype)


def tensor_of(value: Value) -> Tensor:
    """The value as a tensor of the traced graph."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Filled):
        return torch.full(value.shape, value.number, dtype=value.dtype)
    if isinstance(value, Counting):
        count = torch.arange(value.length, dtype=value.dtype)
        count = count if same(value.start, 0) else count + value.start
        return count.reshape(value.shape)
    items = value.items
    if len(items) == 1:
        return torch.full(value.shape, items[0], dtype=value.dtype)
    if not any(isinstance(item, SymInt) for item in items):
        return torch.tensor(items, dtype=value.dtype).reshape(value.array.shape)
    parts = [torch.full((1,), item, dtype=value.dtype) for item in items]
    return torch.cat(parts).reshape(value.array.shape)


def same(a: object, b: object) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return bool(statically_known_true(a == b))


def same_shape(a: Iterable[object], b: Iterable[object]) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    left, right = tuple(a), tuple(b)
    return len(left) == len(right) and all(map(same, left, right))


def holds(condition: bool | np.bool_ | torch.SymBool) -> bool | None:
    """Whether a comparison of sizes is true or false for all values of symbols, else None."""
    if isinstance(condition, bool | np.bool_):
        return bool(condition)
    if statically_known_true(condition):
        return True
    return False if statically_known_true(torch.sym_not(condition)) else None


def joint_shape(*shapes: Sequence[Size]) -> tuple[Size, ...] | None:
    """The shape that shapes broadcast to; None where symbols leave it open."""
    rank = max(map(len, shapes))
    found: list[Size] = []
    for axis in range(-rank, 0):
        sizes = [shape[axis] for shape in shapes if len(shape) >= -axis]
        wide = [size for size in sizes if not same(size, 1)]
        if any(not same(size, wide[0]) for size in wide):
            return None
        found.append(wide[0] if wide else 1)
    return tuple(found)
