"""matmul, linear, conv as ONNX."""

from __future__ import annotations

from ...ir.dims import product
from ...ir.node import Node
from .emitter import Converter, Emitter
from .quantized import packed_linear


def _matmul(e: Emitter, node: Node, a: str, b: str) -> str:
    return e.op("MatMul", a, b)


def _linear(e: Emitter, node: Node, x: str, weight: str, bias: str = "") -> str:
    packed = packed_linear(e, node, x, bias)
    return dense_linear(e, node, x, weight, bias) if packed is None else packed


def dense_linear(e: Emitter, node: Node, x: str, weight: str, bias: str = "") -> str:
    """``x · weightᵀ + bias`` of numbers."""
    x_node, weight_node = node.operands[:2]
    if not node.dtype.is_float:
        product_ = e.op("MatMul", x, e.op("Transpose", weight, perm=[1, 0]))
        return e.op("Add", product_, bias) if bias else product_
    if x_node.type.rank == 2:
        return e.op("Gemm", x, weight, bias, transB=1)
    # Gemm takes rows: a reshape moves nothing, and the weight stays as the checkpoint has it.
    rows = product(x_node.shape[:-1])
    flat = e.op("Gemm", e.view(x, (rows, weight_node.shape[1])), weight, bias, transB=1)
    return e.view(flat, node.shape)


def _conv(e: Emitter, node: Node, x: str, weight: str, bias: str = "") -> str:
    padding = node.attr("padding")
    assert isinstance(padding, tuple)
    stride, dilation = node.attr("stride"), node.attr("dilation")
    assert isinstance(stride, tuple) and isinstance(dilation, tuple)
    return e.op(
        "Conv",
        x,
        weight,
        bias,
        strides=list(stride),
        pads=list(padding * 2),
        dilations=list(dilation),
        group=node.attr("groups"),
    )


CONVERTERS: dict[str, Converter] = {"matmul": _matmul, "linear": _linear, "conv": _conv}
