"""Elementwise ops. Operands have one element type (``cast`` is explicit) and broadcast as in torch.

Integers stay integers, so ops that torch answers in floats take floats only; ``logical_*`` take
booleans only; 8-bit floats are storage, and must be cast before computing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..dims import Size
from ..dtypes import DType
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType


def broadcast(op: str, *types: TensorType) -> tuple[Size, ...]:
    """The common shape of operands; GraphError when two sizes differ and neither is 1."""
    rank = max(t.rank for t in types)
    shape: list[Size] = []
    for axis in range(-rank, 0):
        sizes = [t.shape[axis] for t in types if -axis <= t.rank]
        wide = [size for size in dict.fromkeys(sizes) if size != 1]
        if len(wide) > 1:
            raise ill_typed(op, "shapes that broadcast", *types)
        shape.append(wide[0] if wide else 1)
    return tuple(shape)


def _takes(op: str, dtype: DType) -> bool:
    """Whether torch computes the op in that element type and answers in the same."""
    if dtype.is_float8:
        return False
    if op in _LOGICAL or op == "logical_not":
        return dtype is DType.BOOL
    if op in _FLOAT_ONLY:
        return dtype.is_float or (dtype.is_complex and op not in ("erf", "log1p", "gelu", "isnan"))
    if op in _REAL_ONLY and dtype.is_complex:
        return False
    return dtype is not DType.BOOL or op in _BOOL_TOO


def _same(op: str) -> Callable[..., TensorType]:
    def infer(*types: TensorType) -> TensorType:
        if len({t.dtype for t in types}) > 1 or not _takes(op, types[0].dtype):
            raise ill_typed(op, "operands of one element type that the op computes in", *types)
        return TensorType(types[0].dtype, broadcast(op, *types))

    return infer


def _to_bool(op: str) -> Callable[..., TensorType]:
    def infer(*types: TensorType) -> TensorType:
        return _same(op)(*types).with_dtype(DType.BOOL)

    return infer


def _gelu_type(x: TensorType, *, approximate: str = "none") -> TensorType:
    if approximate not in ("none", "tanh"):
        raise ill_typed("gelu", "approximate none or tanh", x)
    return _same("gelu")(x)


def _cast_type(x: TensorType, *, dtype: DType) -> TensorType:
    if x.dtype.is_complex and not dtype.is_complex:
        raise ill_typed("cast", f"a real operand for {dtype}; the imaginary part would go", x)
    return x.with_dtype(dtype)


def _where_type(condition: TensorType, a: TensorType, b: TensorType) -> TensorType:
    if condition.dtype is not DType.BOOL or a.dtype is not b.dtype:
        raise ill_typed("where", "(bool, t, t)", condition, a, b)
    return TensorType(a.dtype, broadcast("where", condition, a, b))


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def _flops(per_element: int) -> Callable[[Node], Size]:
    return lambda node: node.type.numel * per_element


def _floats(generator: torch.Generator, count: int, positive: bool) -> tuple[torch.Tensor, ...]:
    shapes = ((3, 1, 5), (4, 5))[:count]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tuple(x.abs() + 0.1 if positive else x for x in drawn)


def _samples(count: int, positive: bool) -> Callable[[torch.Generator], Sequence[Sample]]:
    return lambda generator: [Sample(_floats(generator, count, positive))]


def _bools(count: int) -> Callable[[torch.Generator], Sequence[Sample]]:
    return lambda g: [Sample(tuple(x > 0 for x in _floats(g, count, False)))]


_UNARY: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "neg": (torch.neg, 1),
    "abs": (torch.abs, 1),
    "exp": (torch.exp, 8),
    "log": (torch.log, 8),
    "log1p": (torch.log1p, 8),
    "sqrt": (torch.sqrt, 4),
    "rsqrt": (torch.rsqrt, 4),
    "reciprocal": (torch.reciprocal, 4),
    "sin": (torch.sin, 8),
    "cos": (torch.cos, 8),
    "tanh": (torch.tanh, 8),
    "sigmoid": (torch.sigmoid, 8),
    "erf": (torch.erf, 8),
    "relu": (torch.relu, 1),
    "silu": (torch.nn.functional.silu, 9),
    "floor": (torch.floor, 1),
    "ceil": (torch.ceil, 1),
    "round": (torch.round, 1),
    "sign": (torch.sign, 1),
}
_BINARY: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "add": (torch.add, 1),
    "sub": (torch.sub, 1),
    "mul": (torch.mul, 1),
    "div": (torch.div, 4),
    "pow": (torch.pow, 16),
    "maximum": (torch.maximum, 1),
    "minimum": (torch.minimum, 1),
    "floordiv": (torch.floor_divide, 4),
    "remainder": (torch.remainder, 4),
}
_COMPARE: dict[str, Callable[..., torch.Tensor]] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}
_LOGICAL: dict[str, Callable[..., torch.Tensor]] = {
    "logical_and": torch.bitwise_and,
    "logical_or": torch.bitwise_or,
    "logical_xor": torch.bitwise_xor,
}
_FLOAT_ONLY = frozenset(
    [
        "exp",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "erf",
        "silu",
        "gelu",
        "div",
        "isnan",
    ]
)
_REAL_ONLY = frozenset(
    [
        "abs",
        "floor",
        "ceil",
        "round",
        "sign",
        "relu",
        "maximum",
        "minimum",
        "floordiv",
        "remainder",
        "lt",
        "le",
        "gt",
        "ge",
    ]
)
_BOOL_TOO = frozenset(["add", "mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"])
COMMUTATIVE = frozenset(
    {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor"}
)


def _register(
    name: str,
    operands: tuple[str, ...],
    reference: Callable[..., torch.Tensor],
    flops: int,
    *,
    infer: Callable[..., TensorType] | None = None,
    attrs: tuple[str, ...] = (),
    samples: Callable[[torch.Generator], Sequence[Sample]] | None = None,
) -> None:
    positive = name in ("log", "log1p", "sqrt", "rsqrt", "pow", "div", "reciprocal")
    register(
        OpSchema(
            name,
            operands,
            infer or _same(name),
            reference,
            attrs,
            _flops(flops),
            samples or _samples(len(operands), positive),
            elementwise=True,
        )
    )


for _name, (_function, _cost) in _UNARY.items():
    _register(_name, ("x",), _function, _cost)
for _name, (_function, _cost) in _BINARY.items():
    _register(_name, ("a", "b"), _function, _cost)
for _name, _function in _COMPARE.items():
    _register(_name, ("a", "b"), _function, 1, infer=_to_bool(_name))
for _name, _function in _LOGICAL.items():
    _register(_name, ("a", "b"), _function, 1, samples=_bools(2))
_register("logical_not", ("x",), torch.bitwise_not, 1, samples=_bools(1))
_register("isnan", ("x",), torch.isnan, 1, infer=_to_bool("isnan"))
_register("gelu", ("x",), _gelu, 12, infer=_gelu_type, attrs=("approximate",))
_register(
    "where",
    ("condition", "a", "b"),
    torch.where,
    1,
    infer=_where_type,
    samples=lambda g: [Sample((_floats(g, 1, False)[0] > 0, *_floats(g, 2, False)))],
)
_register(
    "cast",
    ("x",),
    lambda x, *, dtype: x.to(dtype.torch),
    0,
    infer=_cast_type,
    attrs=("dtype",),
    samples=lambda g: [Sample(_floats(g, 1, False), {"dtype": DType.F32})],
)
