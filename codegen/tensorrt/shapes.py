"""Data movement as layers: token axes stay where they are."""

from __future__ import annotations

from ...ir.graph import input_name
from ...ir.node import Node
from ..constants import is_constant
from .writer import Converter, Refusal, Writer, leading, sizes_behind

_MIXES = Refusal("it moves tokens")


def _x(w: Writer, node: Node) -> str:
    source = node.operands[0]
    return w.operand(source, source.type.rank + 1)


def _reshape(w: Writer, node: Node) -> str | Refusal:
    source = node.operands[0]
    if leading(source) != leading(node):
        return _MIXES
    if source.shape == node.shape:
        return w.value(source)
    return w.add("shuffle", _x(w, node), shape=(0, 0, *node.shape[1:]))


def _permute(w: Writer, node: Node) -> str | Refusal:
    dims = node.attr("dims")
    assert isinstance(dims, tuple)
    if dims[0] != 0:
        return _MIXES
    return w.transposed(_x(w, node), (0, *(int(str(dim)) + 1 for dim in dims)))


def _slice(w: Writer, node: Node) -> str | Refusal:
    dim, start, stop, step = (node.attr(name) for name in ("dim", "start", "stop", "step"))
    bounds = (dim, start, stop, step)
    if dim == 0 or not all(isinstance(bound, int) for bound in bounds):
        return _MIXES
    assert isinstance(dim, int)
    return w.add("slice", _x(w, node), axis=dim + 1, start=start, stop=stop, step=step)


def _concat(w: Writer, node: Node) -> str | Refusal:
    dim = node.attr("dim")
    assert isinstance(dim, int)
    if dim == 0 or any(is_constant(o) for o in node.operands):
        return _MIXES
    parts = [w.operand(o, o.type.rank + 1) for o in node.operands]
    return w.add("concatenation", *parts, axis=dim + 1)


def _embedding(w: Writer, node: Node) -> str | Refusal:
    """Rows of a table, or those of a batch that logits are wanted of."""
    table, ids = node.operands
    if is_constant(ids):
        return _MIXES
    if is_constant(table):
        return w.add("gather", w.constant(table), w.value(ids), axis=0)
    picked = ids.op == "input" and input_name(ids) == "logits_indices"
    if not picked or leading(table) != ("batch", "length"):
        return _MIXES
    x = w.operand(table, table.type.rank + 1)
    flat = w.add("shuffle", x, shape=(1, -1, *sizes_behind(table)))
    return w.add("gather", flat, w.add("shuffle", w.value(ids), shape=(-1,)), axis=1)


def _index_select(w: Writer, node: Node) -> str | Refusal:
    return _embedding(w, node) if node.attr("dim") == 0 else _MIXES


CONVERTERS: dict[str, Converter] = {
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "concat": _concat,
    "embedding": _embedding,
    "index_select": _index_select,
}
