"""Products of two operands in codes by the libraries that torch brings: cuBLASLt and CUTLASS for
e4m3, cuBLAS for int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from ...ir.dtypes import DType
from ...ir.node import Node
from ...ir.schema import schema

_ALIGNED = 16  # sizes that both libraries take are multiples of it
_FEW = 32  # torch._int_mm takes more than 16 rows; here they are filled up to this


def takes_scaled(node: Node) -> bool:
    """Whether a library computes a ``scaled_linear``: a scale for each row of both operands, or one
    for all, results of e4m3 in bfloat16, and sizes that are multiples of 16.
    """
    codes, _, weight = node.operands[:3]
    sizes = [size for size in weight.shape if isinstance(size, int)]
    plain = node.attr("group") == 0 and node.attr("rows") in (0, 1) and codes.type.rank == 2
    if not plain or any(size % _ALIGNED for size in sizes):
        return False
    return weight.dtype is DType.I8 or node.dtype is DType.BF16


def scaled_product(
    xq: torch.Tensor,
    xs: torch.Tensor,
    wq: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: DType,
    rows: int = 1,
    group: int = 0,
) -> torch.Tensor:
    """``scaled_linear`` of codes [T, K] and [N, K], as `takes_scaled` has it. Where the device is a
    CPU, by the op's reference.

    Sums of e4m3 stay in the tensor cores, which keep some 14 bits of them, as vLLM and torchao have
    it: 11 to 16% quicker for 4096 tokens of an 8B shape on an H100. The largest error of an output,
    0.2% of the largest magnitude, which is bfloat16's, becomes 0.4 to 0.8%; the codes' own rounding
    has cost several times that.
    """
    if not xq.is_cuda:
        reference = cast("Callable[..., torch.Tensor]", schema("scaled_linear").reference)
        return reference(xq, xs, wq, ws, bias, dtype=dtype, rows=rows, group=group)
    if wq.dtype == torch.int8:
        wide = _int_product(xq, wq).float() * xs.float().reshape(-1, 1) * ws.float().reshape(1, -1)
        return (wide if bias is None else wide + bias.float()).to(dtype.torch)
    if xs.numel() > 1 or ws.numel() > 1:  # a scale for each row of both, or one for all
        xs, ws = _of_rows(xs, xq), _of_rows(ws, wq)
    result = torch._scaled_mm(
        xq,
        wq.t(),
        scale_a=xs.float().contiguous(),
        scale_b=ws.float().contiguous().t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return result if bias is None else result + bias


def _of_rows(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[rows, 1]. Mostly they are, and a view of the same costs the host 1 to 2 us."""
    rows = (codes.shape[0], 1)
    return scales if scales.shape == rows else scales.expand(rows)


def _int_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 [T, N]."""
    tokens = x.shape[0]
    if tokens < _FEW:
        x = torch.nn.functional.pad(x, (0, 0, 0, _FEW - tokens))
    return torch._int_mm(x, weight.t())[:tokens]
