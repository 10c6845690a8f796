"""Products of weights as layers: numbers, or codes behind a dequantize layer that TensorRT fuses.

TensorRT's codes are symmetric. 4-bit ones are signed, where ours are unsigned around 8: the top bit
of each is turned over. Scales of groups have the product's element type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.build import cast, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from ..decoder import computed
from .writer import Converter, Refusal, Writer

_FLIP = 0x88  # the top bits of two codes in a byte


@dataclass(frozen=True, slots=True)
class _Codes:
    """What a dequantize layer reads: codes [N, K], scales by blocks, zero points or None."""

    codes: Node
    scale: Node
    zero: Node | None
    rows: int
    group: int
    dtype: DType
    shape: tuple[int, int]


def _linear(w: Writer, node: Node) -> str | Refusal:
    x, weight, bias = (*node.args, None)[:3]
    assert x is not None and weight is not None
    if not is_constant(weight) or (bias is not None and not is_constant(bias)):
        return Refusal("a product with a weight that is computed")
    if weight.op != "dequantize":
        return _product(w, node, w.operand(x, x.type.rank + 1), w.constant(weight), bias)
    codes = _codes_of(weight)
    dequantized = _dequantized(w, codes)
    if isinstance(dequantized, Refusal):
        return dequantized
    return _product(w, node, w.operand(x, x.type.rank + 1), dequantized, bias)


def _product(w: Writer, node: Node, x: str, weight: str, bias: Node | None) -> str:
    """``x`` [batch, length, …, K] by a weight [N, K]."""
    rank = node.type.rank + 1
    count, width = node.shape[-1], node.operands[0].shape[-1]
    if node.op == "scaled_linear":
        width = node.operands[2].shape[1]
    lifted = w.add("shuffle", weight, shape=(*(1,) * (rank - 2), count, width))
    found = w.add("matrix_multiply", x, lifted, transpose=True)
    if bias is None:
        return found
    return w.add("elementwise", found, w.operand(bias, rank, node.dtype), op="sum")


def _codes_of(weight: Node) -> _Codes:
    q, scale, zero = (*weight.args, None)[:3]
    assert q is not None and scale is not None
    rows, group, (count, width) = weight.attr("rows"), weight.attr("group"), weight.shape
    assert isinstance(rows, int) and isinstance(group, int)
    assert isinstance(count, int) and isinstance(width, int)
    return _Codes(q, scale, zero, rows, group, weight.dtype, (count, width))


def _dequantized(w: Writer, codes: _Codes) -> str | Refusal:
    """The weight [N, K] behind its codes."""
    reason = _unfit(codes)
    if reason:
        return Refusal(f"a weight of {codes.codes.dtype} codes, {reason}")
    count, width = codes.shape
    stem = w.names.get(codes.codes, f"{w.stem}.codes")
    if codes.codes.dtype is not DType.U8:
        scale = reshape(cast(codes.scale, DType.F32), *(() if codes.rows == 0 else (count,)))
        q = w.fold(codes.codes, stem)
        return w.add("dequantize", q, w.constant(scale), dtype=codes.dtype)
    graph, source = w.graph, codes.codes
    key = ("four bits", source)
    if key not in w.memo:

        def load() -> torch.Tensor:
            return computed(source, graph)[:, : width // 2] ^ _FLIP

        w.memo[key] = w.enter(stem, DType.U8, codes.shape, load, four_bits=True)
    groups = width // codes.group if 0 < codes.group < width else 1
    scale = reshape(cast(codes.scale, codes.dtype), count, groups)
    return w.add("dequantize", w.memo[key], w.constant(scale), dtype=codes.dtype)


def _unfit(codes: _Codes) -> str:
    """Why a dequantize layer cannot say what a weight is; '' where it can."""
    if codes.zero is not None:
        return "with zero points"
    width = codes.shape[1]
    if codes.codes.dtype is DType.U8:
        inside = width > codes.group > 0 and width % codes.group
        if codes.rows != 1 or inside or width % 2:
            return f"whose {width} columns end within a group or a byte"
        return ""
    if codes.codes.dtype not in (DType.I8, DType.F8E4M3):
        return "which are no int8, e4m3 or 4 bits"
    if codes.group or codes.rows not in (0, 1):
        return "with scales of blocks"
    return ""


def _quantize_rows(w: Writer, node: Node) -> tuple[str, str] | Refusal:
    x, static = (*node.args, None)[:2]
    assert x is not None
    dtype = node.types[0].dtype
    if static is None or dtype is not DType.F8E4M3:
        return Refusal("activations whose scales are made at run time")
    q = w.add("quantize", w.operand(x, x.type.rank + 1), _scale(w, static), dtype=dtype)
    return q, w.constant(static)


def _scaled_linear(w: Writer, node: Node) -> str | Refusal:
    xq, xs, wq, ws, bias = (*node.args, None)[:5]
    assert xq is not None and xs is not None and wq is not None and ws is not None
    rows, group = node.attr("rows"), node.attr("group")
    if not is_constant(xs) or not is_constant(wq) or rows != 0 or group != 0:
        return Refusal("codes whose scales are not of whole tensors, and known")
    count, width = wq.shape
    assert isinstance(count, int) and isinstance(width, int)
    x = w.add("dequantize", w.value(xq), _scale(w, xs), dtype=node.dtype)
    weight = _dequantized(w, _Codes(wq, ws, None, 0, 0, node.dtype, (count, width)))
    if isinstance(weight, Refusal):
        return weight
    return _product(w, node, x, weight, bias)


def _scale(w: Writer, node: Node) -> str:
    """A scale of a whole tensor, f32[]."""
    return w.constant(reshape(cast(node, DType.F32)))


CONVERTERS: dict[str, Converter] = {
    "linear": _linear,
    "quantize_rows": _quantize_rows,
    "scaled_linear": _scaled_linear,
}
