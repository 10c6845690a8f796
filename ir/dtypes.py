"""Element types: their IR names and their torch counterparts."""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import torch

from ..errors import GraphError

TorchDType: TypeAlias = torch.dtype  # inside the class below, `torch` is a property


class DType(Enum):
    """An element type. The value is its name in IR text."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "f8e4m3"
    F8E5M2 = "f8e5m2"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"
    C64 = "c64"
    C128 = "c128"

    @property
    def torch(self) -> TorchDType:
        """The torch dtype of the same meaning."""
        return _TORCH[self]

    @property
    def bytes(self) -> int:
        """Size of one element in bytes."""
        return _TORCH[self].itemsize

    @property
    def is_float(self) -> bool:
        """Whether it is a real floating-point type."""
        return _TORCH[self].is_floating_point

    @property
    def is_integer(self) -> bool:
        """Whether it is an integer type (bool is not)."""
        return self in (DType.I64, DType.I32, DType.I16, DType.I8, DType.U8)

    @property
    def is_complex(self) -> bool:
        """Whether it is a complex type."""
        return _TORCH[self].is_complex

    @property
    def is_float8(self) -> bool:
        """Whether it is an 8-bit float: storage only, cast before computing."""
        return self in (DType.F8E4M3, DType.F8E5M2)

    @staticmethod
    def from_torch(dtype: TorchDType) -> DType:
        """The IR type of a torch dtype; GraphError for those the IR has no name for."""
        if dtype not in _FROM_TORCH:
            raise GraphError(
                f"{dtype}",
                expected=f"one of {', '.join(map(str, _FROM_TORCH))}",
                found=f"{dtype}",
                remedy="Cast the tensor.",
            )
        return _FROM_TORCH[dtype]

    def __str__(self) -> str:
        return self.value


_TORCH: dict[DType, torch.dtype] = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8E4M3: torch.float8_e4m3fn,
    DType.F8E5M2: torch.float8_e5m2,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
    DType.C64: torch.complex64,
    DType.C128: torch.complex128,
}
_FROM_TORCH = {torch_dtype: dtype for dtype, torch_dtype in _TORCH.items()}
DTYPE_NAMES: dict[str, DType] = {dtype.value: dtype for dtype in DType}
