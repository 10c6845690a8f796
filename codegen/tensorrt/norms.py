"""Norms, gated activations and rotary embedding as layers."""

from __future__ import annotations

from ...ir.build import const, make
from ...ir.dtypes import DType
from ...ir.graph import Graph, input_name
from ...ir.node import Node
from ..constants import is_constant
from ..rotary import table_of, tabulable
from .elementwise import activate
from .writer import Converter, Refusal, Writer, is_narrow

_FLOATS = (DType.F32, DType.F16, DType.BF16)
HEADS_FIRST = (0, 2, 1, 3)
"""Between [batch, length, heads, width] and [batch, heads, length, width], either way."""


def _rms_norm(w: Writer, node: Node) -> str | Refusal:
    """By parts, in float32, rounded where the model rounds: TensorRT's layer subtracts the mean,
    and its compiler makes one kernel of the parts.
    """
    x, weight = (*node.args, None)[:2]
    assert x is not None
    if weight is not None and not is_constant(weight):
        return Refusal("a norm by a weight that is computed")
    rank, eps = node.type.rank + 1, node.attr("eps")
    assert isinstance(eps, float)
    wide = w.wide(w.operand(x, rank), node.dtype)
    square = w.add("elementwise", wide, wide, op="prod")
    mean = w.add("reduce", square, op="avg", axes=(rank - 1,))
    shifted = w.add("elementwise", mean, w.scalar(eps, DType.F32, rank), op="sum")
    root = w.add("unary", shifted, op="sqrt")
    normed = w.add("elementwise", wide, root, op="div")
    if weight is None:
        return w.narrow(normed, node.dtype)
    if node.attr("stepwise"):
        normed = w.narrow(normed, node.dtype)
        return w.add("elementwise", normed, w.operand(weight, rank, node.dtype), op="prod")
    scaled = w.add("elementwise", normed, w.operand(weight, rank, DType.F32), op="prod")
    return w.narrow(scaled, node.dtype)


def _layer_norm(w: Writer, node: Node) -> str | Refusal:
    x, weight, bias = (*node.args, None, None)[:3]
    assert x is not None
    if any(a is not None and not is_constant(a) for a in (weight, bias)):
        return Refusal("a norm by a weight that is computed")
    rank = node.type.rank + 1
    sizes = node.shape[-1:]
    weight = weight if weight is not None else make("expand", const(1, DType.F32), shape=sizes)
    bias = bias if bias is not None else make("expand", const(0, DType.F32), shape=sizes)
    affine = (w.operand(a, rank, DType.F32) for a in (weight, bias))
    wide = w.wide(w.operand(x, rank), node.dtype)
    return w.narrow(w.add("normalization", wide, *affine, eps=node.attr("eps")), node.dtype)


def _gated(w: Writer, node: Node) -> str:
    gate, up = (w.operand(o, node.type.rank + 1) for o in node.operands)
    active = activate(w, str(node.attr("activation")), gate, node.dtype)
    return w.add("elementwise", active, up, op="prod")


def _rope(w: Writer, node: Node) -> str | Refusal:
    """By the rotary layer, over tables of every position."""
    x, *tables = node.operands
    sources = [n for n in Graph("tables", (), tuple(tables)).nodes if n.op == "input"]
    alone = len(sources) == 1 and input_name(sources[0]) == "positions"
    if not alone or not all(tabulable(table, sources[0], _FLOATS) for table in tables):
        return Refusal("a rotation that depends on more than each token's position")
    if node.type.rank not in (2, 3):
        return Refusal("a rotation of something else than heads")
    # Tables that are wider than x keep their bits.
    dtype = DType.F32 if any(t.dtype is DType.F32 for t in tables) else node.dtype
    half, width = tables[0].shape[-1], node.shape[-1]
    assert isinstance(half, int) and isinstance(width, int)
    cos, sin = (w.constant(table_of(t, sources[0], w.max_len), 2, dtype) for t in tables)
    source = w.operand(x, node.type.rank + 1)
    if node.type.rank == 2:  # a single head
        source = w.add("shuffle", source, shape=(0, 0, 1, width))
    heads = w.transposed(source, HEADS_FIRST)
    wide = heads if dtype is node.dtype else w.add("cast", heads, dtype=dtype)
    turned = w.add(
        "rotary_embedding",
        wide,
        cos,
        sin,
        w.value(sources[0]),
        interleaved=node.attr("layout") == "interleaved",
        width=0 if 2 * half == width else 2 * half,
    )
    if dtype is not node.dtype:
        assert is_narrow(node.dtype)
        turned = w.add("cast", turned, dtype=node.dtype)
    back = w.transposed(turned, HEADS_FIRST)
    if node.type.rank == 2:
        return w.add("shuffle", back, shape=(0, 0, width))
    w.heads_first[node] = turned
    return back


CONVERTERS: dict[str, Converter] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gated": _gated,
    "rope": _rope,
}
