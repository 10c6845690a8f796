"""Leaves and structure: input, param, const, iota, dim_value, item."""

from __future__ import annotations

import torch

from ...errors import GraphError
from ..dims import Size
from ..dtypes import DType
from ..schema import OpSchema, Sample, register
from ..types import TensorType, ValueType


def _declared(*, name: str, type: TensorType) -> TensorType:
    return type


def _unbound(*, name: str, type: TensorType) -> torch.Tensor:
    raise GraphError(
        name, expected="a value", found="none", remedy="Give it to the interpreter as an input."
    )


def _const(*, value: float, dtype: DType) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype.torch)


def _iota_type(*, size: Size, dtype: DType) -> TensorType:
    return TensorType(dtype, (size,))


def _iota(*, size: int, dtype: DType) -> torch.Tensor:
    return torch.arange(size, dtype=dtype.torch)


def _item_type(source: ValueType, *, index: int) -> TensorType:
    if isinstance(source, TensorType) or not 0 <= index < len(source):
        raise GraphError(
            "item",
            expected=f"a node with more than {index} results",
            found=str(source),
            remedy="Take a result that exists.",
        )
    return source[index]


def _item(source: tuple[torch.Tensor, ...], *, index: int) -> torch.Tensor:
    return source[index]


INPUT = register(OpSchema("input", (), _declared, _unbound, ("name", "type")))
PARAM = register(OpSchema("param", (), _declared, _unbound, ("name", "type")))
CONST = register(
    OpSchema(
        "const",
        (),
        lambda *, value, dtype: TensorType(dtype, ()),
        _const,
        ("value", "dtype"),
        samples=lambda g: [Sample((), {"value": 2.5, "dtype": DType.F32})],
    )
)
IOTA = register(
    OpSchema(
        "iota",
        (),
        _iota_type,
        _iota,
        ("size", "dtype"),
        samples=lambda g: [Sample((), {"size": 5, "dtype": DType.I64})],
    )
)
DIM_VALUE = register(
    OpSchema(
        "dim_value",
        (),
        lambda *, size, dtype: TensorType(dtype, ()),
        lambda *, size, dtype: torch.tensor(size, dtype=dtype.torch),
        ("size", "dtype"),
        samples=lambda g: [Sample((), {"size": 7, "dtype": DType.I64})],
    )
)
ITEM = register(OpSchema("item", ("source",), _item_type, _item, ("index",)))
