"""Products and convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, Rule


def _matmul(c: Call) -> Tensor:
    return torch.matmul(c.tensor(0), c.tensor(1))


def _gemm(c: Call) -> Tensor:
    a, b, bias = c.tensor(0), c.tensor(1), c.maybe(2)
    a = a.t() if c.integer("transA", 0) else a
    alpha, beta = c.number("alpha", 1.0), c.number("beta", 1.0)
    rows = b if c.integer("transB", 0) else b.t()
    if bias is not None and alpha == beta == 1 and bias.shape == rows.shape[:1]:
        return F.linear(a, rows, bias)
    product = F.linear(a, rows)
    product = product if alpha == 1 else product * alpha
    return product if bias is None else product + (bias if beta == 1 else bias * beta)


def linear(c: Call) -> Tensor:
    """x [..., K] and a weight [N, K] in codes, read as numbers, with a bias [N] or none."""
    return F.linear(c.tensor(0), c.tensor(1), c.maybe(2))


def _matmul_integer(c: Call) -> Tensor:
    a, b = (_centred(c, index) for index in (0, 1))
    # In float64 every sum of products of bytes is exact.
    return torch.matmul(a.double(), b.double()).to(torch.int32)


def _centred(c: Call, index: int) -> Tensor:
    """Codes less their zero points, which for a are one a row and for b one a column."""
    codes, zero = c.tensor(index).to(torch.int32), c.maybe(index + 2)
    if zero is None:
        return codes
    zero = zero.to(torch.int32)
    return codes - (zero.unsqueeze(-1) if index == 0 and zero.dim() == 1 else zero)


def _einsum(c: Call) -> Tensor:
    return torch.einsum(c.text("equation", ""), *(c.tensor(i) for i in range(len(c.values))))


def _conv(c: Call) -> Tensor:
    x, weight, bias = c.tensor(0), c.tensor(1), c.maybe(2)
    axes = x.dim() - 2
    if axes not in (1, 2, 3):
        c.refuse("a convolution over one to three axes", f"{axes}")
    strides, dilations = (c.ints(name) or [1] * axes for name in ("strides", "dilations"))
    mode = c.text("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        pads = _same(c, x, weight, strides, dilations, mode == "SAME_UPPER")
    else:
        pads = c.ints("pads") or [0] * (2 * axes)
    before, after = pads[:axes], pads[axes:]
    if before != after:
        flat = [pad for pair in zip(before[::-1], after[::-1], strict=True) for pad in pair]
        x, before = F.pad(x, flat), [0] * axes
    function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return function(x, weight, bias, strides, before, dilations, c.integer("group", 1))


def _same(
    c: Call, x: Tensor, weight: Tensor, strides: list[int], dilations: list[int], upper: bool
) -> list[int]:
    """Pads by which a stride of s gives ceil(size / s); the odd one is behind for ``upper``."""
    totals = []
    for size, kernel, stride, step in zip(
        x.shape[2:], weight.shape[2:], strides, dilations, strict=True
    ):
        if not isinstance(size, int):
            c.refuse("pads as numbers where sizes are dynamic", c.text("auto_pad", ""))
        totals.append(max((-(-size // stride) - 1) * stride + (kernel - 1) * step + 1 - size, 0))
    low, high = [total // 2 for total in totals], [-(-total // 2) for total in totals]
    return [*low, *high] if upper else [*high, *low]


def _global_average(c: Call) -> Tensor:
    x = c.tensor(0)
    return x.mean(list(range(2, x.dim())), keepdim=True)


RULES: dict[str, Rule] = {
    "Conv": _conv,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
}
