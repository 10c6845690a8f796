"""matmul, linear, conv as ONNX."""

from __future__ import annotations

from ...ir.dims import product
from ...ir.node import Node
from .emitter import Converter, Emitter


def _matmul(e: Emitter, node: Node, a: str, b: str) -> str:
    return e.op("MatMul", a, b)


def _linear(e: Emitter, node: Node, x: str, weight: str, bias: str = "") -> str:
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
    lists = {name: list(node.attr(attr)) for name, attr in _WINDOW}  # type: ignore[arg-type]
    return e.op("Conv", x, weight, bias, pads=list(padding * 2), group=node.attr("groups"), **lists)


_WINDOW = (("strides", "stride"), ("dilations", "dilation"))

CONVERTERS: dict[str, Converter] = {"matmul": _matmul, "linear": _linear, "conv": _conv}
