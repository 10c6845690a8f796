"""Reductions and scans: sum, mean, amax, amin, prod, any, all, argmax, argmin, softmax, ...

They keep the element type: sums of integers do not widen as torch's do. No ``dims`` reduce nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dims import Size, is_nonnegative
from ..dtypes import DType
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType, TupleType


def reduced(x: TensorType, dims: tuple[int, ...], keepdim: bool) -> tuple[Size, ...]:
    """Shape after reducing ``dims`` (non-negative, different)."""
    if len(set(dims)) < len(dims) or any(not 0 <= d < x.rank for d in dims):
        raise ill_typed("reduction", f"different dimensions within the rank, not {dims}", x)
    if keepdim:
        return tuple(1 if i in dims else s for i, s in enumerate(x.shape))
    return tuple(s for i, s in enumerate(x.shape) if i not in dims)


def _reduce_type(x: TensorType, *, dims: tuple[int, ...], keepdim: bool = False) -> TensorType:
    if x.dtype.is_float8:
        raise ill_typed("reduction", "an element type to compute in; cast first", x)
    return x.with_shape(reduced(x, dims, keepdim))


def _mean_type(x: TensorType, *, dims: tuple[int, ...], keepdim: bool = False) -> TensorType:
    if not x.dtype.is_float:
        raise ill_typed("mean", "floats; cast first", x)
    return _reduce_type(x, dims=dims, keepdim=keepdim)


def _scan_type(op: str, floats: bool) -> Callable[..., TensorType]:
    def infer(x: TensorType, *, dim: int) -> TensorType:
        if not 0 <= dim < x.rank or x.dtype.is_float8 or (floats and not x.dtype.is_float):
            raise ill_typed(op, f"a dimension below the rank, not {dim}, of numbers", x)
        return x

    return infer


def _test_type(x: TensorType, *, dims: tuple[int, ...], keepdim: bool = False) -> TensorType:
    return TensorType(DType.BOOL, reduced(x, dims, keepdim))


def _index_type(x: TensorType, *, dim: int, keepdim: bool = False) -> TensorType:
    return TensorType(DType.I64, reduced(x, (dim,), keepdim))


def _each_dim(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Applies a reduction of one dimension to several."""

    def reference(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
        for dim in sorted(dims, reverse=True):
            x = function(x, dim, keepdim=keepdim)
        return x

    return reference


def _all_dims(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Torch takes no dimensions for all of them."""

    def reference(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
        return function(x, dims, keepdim=keepdim) if dims else x

    return reference


def _sum(x: torch.Tensor, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return torch.sum(x, dims, keepdim=keepdim, dtype=x.dtype)


def _prod(x: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
    return torch.prod(x, dim, keepdim=keepdim, dtype=x.dtype)


def _any(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
    return _each_dim(torch.any)(x.bool(), dims=dims, keepdim=keepdim)


def _all(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
    return _each_dim(torch.all)(x.bool(), dims=dims, keepdim=keepdim)


def _topk_type(
    x: TensorType, *, k: int, dim: int, largest: bool = True, sorted: bool = True
) -> TupleType:
    if not 0 <= dim < x.rank:
        raise ill_typed("topk", f"dimension {dim} within the rank", x)
    if is_nonnegative(k - x.shape[dim] - 1):
        raise ill_typed("topk", f"at least {k} elements along dimension {dim}", x)
    shape = (*x.shape[:dim], k, *x.shape[dim + 1 :])
    return (x.with_shape(shape), TensorType(DType.I64, shape))


def _flops(node: Node) -> Size:
    return node.operands[0].type.numel


def _x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn((3, 4, 5), generator=generator, dtype=torch.float64)


def _register_reduction(name: str, reference: Callable[..., torch.Tensor]) -> None:
    test = name in ("any", "all")
    infer = _test_type if test else _mean_type if name == "mean" else _reduce_type
    register(
        OpSchema(
            name,
            ("x",),
            infer,
            reference,
            ("dims", "keepdim"),
            _flops,
            lambda g: [
                Sample((_x(g) > 0 if test else _x(g),), {"dims": (1,), "keepdim": True}),
                Sample((_x(g) > 0 if test else _x(g),), {"dims": (0, 2)}),
            ],
        )
    )


_register_reduction("sum", _all_dims(_sum))
_register_reduction("mean", _all_dims(torch.mean))
_register_reduction("amax", _all_dims(torch.amax))
_register_reduction("amin", _all_dims(torch.amin))
_register_reduction("prod", _each_dim(_prod))
_register_reduction("any", _any)
_register_reduction("all", _all)

for _name, _function in (("argmax", torch.argmax), ("argmin", torch.argmin)):
    register(
        OpSchema(
            _name,
            ("x",),
            _index_type,
            lambda x, *, dim, keepdim=False, _function=_function: _function(x, dim, keepdim),
            ("dim", "keepdim"),
            _flops,
            lambda g: [Sample((_x(g),), {"dim": 1, "keepdim": True})],
        )
    )
SOFTMAX = register(
    OpSchema(
        "softmax",
        ("x",),
        _scan_type("softmax", floats=True),
        lambda x, *, dim: torch.softmax(x, dim),
        ("dim",),
        lambda node: node.type.numel * 12,
        lambda g: [Sample((_x(g),), {"dim": 2})],
    )
)
CUMSUM = register(
    OpSchema(
        "cumsum",
        ("x",),
        _scan_type("cumsum", floats=False),
        lambda x, *, dim: torch.cumsum(x, dim, dtype=x.dtype),
        ("dim",),
        _flops,
        lambda g: [Sample((_x(g),), {"dim": 1})],
    )
)
TOPK = register(
    OpSchema(
        "topk",
        ("x",),
        _topk_type,
        lambda x, *, k, dim, largest=True, sorted=True: tuple(
            torch.topk(x, k, dim, largest, sorted)
        ),
        ("k", "dim", "largest", "sorted"),
        _flops,
        lambda g: [Sample((_x(g),), {"k": 2, "dim": 2})],
    )
)
