"""Leaves and structure: input, param, const, iota, dim_value, item."""

from __future__ import annotations

import torch

from ...errors import GraphError
from ..dims import Size, is_name
from ..dtypes import DType
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType, ValueType


def _input_type(*, name: str, type: TensorType) -> TensorType:
    if not is_name(name) or name == "param":
        raise GraphError(
            f"input {name!r}",
            expected="an ASCII identifier that is neither a keyword nor an element type",
            found=name,
            remedy="Rename the input: it is a parameter in graph text.",
        )
    return _declared(name=name, type=type)


def _declared(*, name: str, type: TensorType) -> TensorType:
    if not isinstance(name, str) or not isinstance(type, TensorType):
        raise TypeError("name is a string and type a tensor type")
    return type


def _unbound(*, name: str, type: TensorType) -> torch.Tensor:
    raise GraphError(
        name, expected="a value", found="none", remedy="Give it to the interpreter as an input."
    )


def _const(*, value: float, dtype: DType) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype.torch)


def _const_type(*, value: float, dtype: DType) -> TensorType:
    # One spelling a constant: 1 and 1.0 of one element type would be two nodes.
    wanted = bool if dtype is DType.BOOL else int if dtype.is_integer else float
    if type(value) is not wanted:
        raise ill_typed("const", f"a {wanted.__name__} for {dtype}, not {value!r}; use const()")
    return TensorType(dtype, ())


def _number_type(*, size: Size, dtype: DType) -> TensorType:
    if dtype is DType.BOOL or dtype.is_float8 or isinstance(size, bool | float):
        raise ill_typed("dim_value", f"a size and a numeric element type, not {dtype}")
    return TensorType(dtype, ())


def _iota_type(*, size: Size, dtype: DType) -> TensorType:
    _number_type(size=size, dtype=dtype)
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


INPUT = register(OpSchema("input", (), _input_type, _unbound, ("name", "type")))
PARAM = register(OpSchema("param", (), _declared, _unbound, ("name", "type")))
CONST = register(
    OpSchema(
        "const",
        (),
        _const_type,
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
        _number_type,
        lambda *, size, dtype: torch.tensor(size, dtype=dtype.torch),
        ("size", "dtype"),
        samples=lambda g: [Sample((), {"size": 7, "dtype": DType.I64})],
    )
)
ITEM = register(OpSchema("item", ("source",), _item_type, _item, ("index",)))
