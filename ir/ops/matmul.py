"""Contractions: matmul, linear, conv."""

from __future__ import annotations

import torch

from ..dims import Size, call, divide, product
from ..dtypes import DType
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType
from .elementwise import broadcast


def _matmul_type(a: TensorType, b: TensorType) -> TensorType:
    numbers = a.dtype is b.dtype and not a.dtype.is_float8 and a.dtype is not DType.BOOL
    if a.rank < 2 or b.rank < 2 or a.shape[-1] != b.shape[-2] or not numbers:
        raise ill_typed("matmul", "[..., M, K] x [..., K, N] of one element type", a, b)
    batch = broadcast("matmul", a.with_shape(a.shape[:-2]), b.with_shape(b.shape[:-2]))
    return a.with_shape((*batch, a.shape[-2], b.shape[-1]))


def _linear_type(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
    fits = weight.rank == 2 and x.rank >= 1 and x.shape[-1] == weight.shape[1]
    if not fits or x.dtype is not weight.dtype:
        raise ill_typed("linear", "x [..., K], weight [N, K] of one element type", x, weight)
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype is not x.dtype):
        raise ill_typed("linear", "bias [N] of that element type", x, weight, bias)
    if x.dtype.is_float8 or x.dtype is DType.BOOL:
        raise ill_typed("linear", "an element type to compute in; cast first", x, weight)
    return x.with_shape((*x.shape[:-1], weight.shape[0]))


def _matmul_flops(node: Node) -> Size:
    return node.type.numel * node.operands[0].shape[-1] * 2


def _conv_type(
    x: TensorType,
    weight: TensorType,
    bias: TensorType | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> TensorType:
    fits = x.rank == weight.rank >= 3 and x.shape[1] == weight.shape[1] * groups
    if not fits or divide(weight.shape[0], groups) is None or x.dtype is not weight.dtype:
        raise ill_typed("conv", "x [B, C, ...], weight [N, C / groups, ...]", x, weight)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype is not x.dtype):
        raise ill_typed("conv", "bias [N] of that element type", x, weight, bias)
    spatial = tuple(
        call("floordiv", size + 2 * p - d * (k - 1) - 1, s) + 1
        for size, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return x.with_shape((x.shape[0], weight.shape[0], *spatial))


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    outputs = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, outputs, groups)


def _conv_flops(node: Node) -> Size:
    weight = node.operands[1]
    return node.type.numel * product(weight.shape[1:]) * 2


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MATMUL = register(
    OpSchema(
        "matmul",
        ("a", "b"),
        _matmul_type,
        torch.matmul,
        (),
        _matmul_flops,
        lambda g: [Sample((_x(g, 2, 3, 4), _x(g, 4, 5))), Sample((_x(g, 2, 3, 4), _x(g, 2, 4, 1)))],
    )
)
LINEAR = register(
    OpSchema(
        "linear",
        ("x", "weight", "bias?"),
        _linear_type,
        torch.nn.functional.linear,
        (),
        _matmul_flops,
        lambda g: [
            Sample((_x(g, 3, 4), _x(g, 5, 4), _x(g, 5))),
            Sample((_x(g, 2, 4), _x(g, 5, 4))),
        ],
    )
)
CONV = register(
    OpSchema(
        "conv",
        ("x", "weight", "bias?"),
        _conv_type,
        _conv,
        ("stride", "padding", "dilation", "groups"),
        _conv_flops,
        lambda g: [
            Sample(
                (_x(g, 1, 4, 6, 6), _x(g, 6, 2, 3, 3), _x(g, 6)),
                {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 2},
            )
        ],
    )
)
