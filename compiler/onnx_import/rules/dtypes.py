"""ONNX element types as torch's."""

from __future__ import annotations

import torch
from onnx import TensorProto

from ..call import Call

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
"""Element types that a value of a graph may have."""


def dtype_of(c: Call, code: int) -> torch.dtype:
    """The torch dtype of an ONNX element type that an attribute names."""
    if code not in DTYPES:
        known = {number: name for name, number in TensorProto.DataType.items()}
        c.refuse(", ".join(known[code] for code in DTYPES), known.get(code, str(code)))
    return DTYPES[code]
