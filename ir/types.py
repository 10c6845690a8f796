"""The type of a value: element type and shape, or a tuple of such for ops with several results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .dims import Size, product, substitute, symbols_of
from .dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dense tensor: ``dtype`` and ``shape``, whose sizes may be symbolic."""

    dtype: DType
    shape: tuple[Size, ...]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> Size:
        """Number of elements."""
        return product(self.shape)

    @property
    def nbytes(self) -> Size:
        """Size in bytes, dense."""
        return self.numel * self.dtype.bytes

    @property
    def symbols(self) -> frozenset[str]:
        """Names of the symbols in the shape."""
        return frozenset().union(*(symbols_of(size) for size in self.shape))

    def with_shape(self, shape: tuple[Size, ...]) -> TensorType:
        """The same element type with another shape."""
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        """The same shape with another element type."""
        return TensorType(dtype, self.shape)

    def substitute(self, values: Mapping[str, Size]) -> TensorType:
        """Replaces symbols in the shape."""
        return self.with_shape(tuple(substitute(size, values) for size in self.shape))

    def __str__(self) -> str:
        # A scalar is f32[()]: Python has no empty subscript.
        return f"{self.dtype}[{', '.join(map(str, self.shape)) or '()'}]"


TupleType: TypeAlias = tuple[TensorType, ...]
ValueType: TypeAlias = "TensorType | TupleType"
