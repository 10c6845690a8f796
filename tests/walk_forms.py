"""Generated kernels for tests of the tuner, nodes as the fusion pass makes them."""

from __future__ import annotations

from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType

T = symbol("T")


def norm_call(hidden: int, dtype: DType = DType.BF16, rows: Size = T) -> Node:
    """A residual sum and its norm, both wanted: two results over [rows, hidden]."""
    x, y = (input_node(name, TensorType(dtype, (rows, hidden))) for name in "xy")
    weight = input_node("weight", TensorType(dtype, (hidden,)))
    total = make("add", x, y)
    return _fused(x, y, weight, results=(total, make("rms_norm", total, weight, eps=1e-5)))


def gated_call(width: int, dtype: DType = DType.BF16, rows: Size = T) -> Node:
    """SwiGLU: silu of the first half of [rows, 2 * width] times the second."""
    x = input_node("x", TensorType(dtype, (rows, 2 * width)))
    gate, up = (make("slice", x, dim=1, start=s, step=1, stop=s + width) for s in (0, width))
    return _fused(x, results=(make("gated", gate, up, activation="silu"),))


def looked_up_call(hidden: int, dtype: DType = DType.BF16) -> Node:
    """Rows of a table and their norm: what an index picks is no problem of a number of tokens."""
    table = input_node("table", TensorType(dtype, (100, hidden)))
    ids = input_node("ids", TensorType(DType.I64, (T,)))
    return _fused(table, ids, results=(make("rms_norm", make("embedding", table, ids), eps=1e-5),))


def _fused(*inputs: Node, results: tuple[Node, ...]) -> Node:
    outer = [input_node(f"outer_{index}", node.type) for index, node in enumerate(inputs)]
    return make("fused", *outer, body=Graph("form", inputs, results), kind="any")
