"""Rows that are rounded to codes become elementary ops, which share the kernel of a norm before."""

from __future__ import annotations

from ..ir.build import cast, const, make, rebuild, reshape
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.ops.quant import LARGEST
from .base import Pass


def open_rows(graph: Graph) -> Graph:
    """Spells ``quantize_rows`` out.

    Before::

        quantize_rows_0: (f8e4m3[T, 64], f32[T, 1],) = quantize_rows(x, dtype=f8e4m3, group=0)

    After::

        abs_0: f32[T, 64] = abs(cast(x))
        amax_0: f32[T, 1] = amax(abs_0, dims=(1,), keepdim=True)
        div_0: f32[T, 1] = div(amax_0, 448.0)
        where_0: f32[T, 1] = where(eq(div_0, 0.0), 1.0, div_0)
        div_1: f32[T, 64] = div(cast(x), where_0)
        cast_0: f8e4m3[T, 64] = cast(maximum(minimum(div_1, 448.0), -448.0))

    Rows in float64, groups that do not divide a row, and scales that are tried, stay.
    """
    values: dict[Node, Node] = {}
    opened: dict[Node, tuple[Node, Node]] = {}
    for node in graph.nodes:
        if node.op == "item" and node.operands[0] in opened:
            index = node.attr("index")
            assert isinstance(index, int)
            values[node] = opened[node.operands[0]][index]
            continue
        values[node] = rebuild(node, values)
        if node.op == "quantize_rows" and _opens(node):
            opened[node] = _opened(values[node])
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))


OPEN_ROWS = Pass("open_rows", open_rows)


def _opens(node: Node) -> bool:
    x, group = node.operands[0], node.attr("group") or 0
    width = x.shape[-1]
    assert isinstance(group, int) and isinstance(width, int)
    plain = x.dtype is not DType.F64 and node.attr("tries") is None
    return plain and width > 0 and not (group and width % group)


def _opened(node: Node) -> tuple[Node, Node]:
    """The codes, and the scale of each row or group."""
    x, static = node.operands[0], node.args[1]
    codes, group = node.types[0].dtype, node.attr("group") or 0
    lead, width = x.shape[:-1], x.shape[-1]
    assert isinstance(group, int) and isinstance(width, int)
    wide = cast(x, DType.F32)
    if group:
        wide = reshape(wide, *lead, width // group, group)
    scale = _scale(wide, codes) if static is None else cast(static, DType.F32)
    rounded = _codes(wide, scale, codes)
    if group:
        rounded = reshape(rounded, *lead, width)
    if static is not None:
        whole = make("expand", scale, shape=node.types[1].shape)
    else:
        whole = reshape(scale, *lead, width // group) if group else scale
    return rounded, whole


def _scale(x: Node, codes: DType) -> Node:
    most = make("amax", make("abs", x), dims=(x.type.rank - 1,), keepdim=True)
    scale = make("div", most, const(LARGEST[codes], DType.F32))
    zero = make("eq", scale, const(0.0, DType.F32))
    return make("where", zero, const(1.0, DType.F32), scale)


def _codes(x: Node, scale: Node, codes: DType) -> Node:
    steps = make("minimum", make("div", x, scale), const(LARGEST[codes], DType.F32))
    steps = make("maximum", steps, const(-LARGEST[codes], DType.F32))
    if codes is DType.I8:
        # A NaN has no code; the scale of its row is NaN.
        whole = make("round", steps)
        steps = make("where", make("isnan", whole), const(0.0, DType.F32), whole)
    return cast(steps, codes)
