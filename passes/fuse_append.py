"""From the projections to paged attention in one op: norms of the heads, rotary embedding, and the
write into the cache. Once q, k and v are slices of one product, that is one kernel a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..ir.build import item, make, reshape
from ..ir.dims import Size
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from .base import Pass
from .rewrite import rebuild

_Tables: TypeAlias = "tuple[Node, Node, Attr, Attr] | None"  # cos, sin [T, R/2], layout, stepwise


def fuse_append(graph: Graph) -> Graph:
    """Takes into one ``append_kv`` what becomes of q, k and v before each ``paged_attention``.

    Before::

        rms_norm_0: f32[T, 4, 8] = rms_norm(q, q_weight, eps=1e-06)
        rope_0: f32[T, 4, 8] = rope(rms_norm_0, cos, sin, layout="half")
        rms_norm_1: f32[T, 2, 8] = rms_norm(k, k_weight, eps=1e-06)
        rope_1: f32[T, 2, 8] = rope(rms_norm_1, cos, sin, layout="half")
        kv_write_0: f32[N, P, 2, 8] = kv_write(k_cache_0, rope_1, slot_mapping)
        kv_write_1: f32[N, P, 2, 8] = kv_write(v_cache_0, v, slot_mapping)
        paged_attention_0: f32[T, 4, 8] = paged_attention(rope_0, kv_write_0, kv_write_1, …)

    After::

        append_kv_0: (f32[N, P, 2, 8], f32[N, P, 2, 8], f32[T, 4, 8],) = append_kv(
            k, v, k_cache_0, v_cache_0, slot_mapping, q, cos, sin, q_weight, k_weight,
            eps=1e-06, layout="half")
        item_0, item_1, item_2 = item(append_kv_0, index=0), …
        paged_attention_0: f32[T, 4, 8] = paged_attention(item_2, item_0, item_1, …)

    The writes of codes and scales below a ``scaled_paged_attention`` become ``scaled_append_kv`` in
    the same way, with the rounding of k and v.

    What does not fit stays in front of it: a norm over more than one head or without a weight, a
    second epsilon, a norm and a rope of which one is stepwise, a q that is turned by other tables
    than k. Where nothing is done to q, it is no operand.
    """
    replacements: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op in _WRITES:
            replacements.update(_appended(graph, node) or {})
    return _replaced(graph, replacements)


FUSE_APPEND = Pass("fuse-append", fuse_append)


@dataclass(frozen=True, slots=True)
class _Path:
    """What a projection goes through: ``rope(rms_norm(x, weight))``, either may be absent.

    Attributes:
        x: [T, heads, D], before everything.
        weight, eps, stepwise: of the norm.
        normed: what the norm gives, [T, heads, D]; ``x`` without one.
        tables: of the rotation.
    """

    x: Node
    weight: Node | None
    eps: Attr
    stepwise: Attr
    normed: Node
    tables: _Tables

    def without_norm(self) -> _Path:
        """The same with the norm left in front of it."""
        return replace(self, x=self.normed, weight=None, eps=None, stepwise=None)

    def rounding(self) -> Attr:
        """The ``stepwise`` of the rope, of the norm where there is none."""
        return self.stepwise if self.tables is None else self.tables[3]


_WRITES = {"paged_attention": (1, 2), "scaled_paged_attention": (1, 2, 8, 9)}
"""Where each attention has its caches: k's, v's, and the scales of both."""


def _appended(graph: Graph, attention: Node) -> dict[Node, Node] | None:
    """What replaces the writes below an attention, and itself where its q is taken in."""
    places = _WRITES[attention.op]
    writes = [node for i in places if (node := attention.args[i]) is not None]
    if any(write.op != "kv_write" for write in writes):
        return None
    # Users stand in topological order. So nothing that q needs reads the writes: no cycle.
    if any(graph.users[write][0] is not attention for write in writes):
        return None
    caches, news = ([write.operands[i] for write in writes] for i in range(2))
    slots = writes[0].operands[2]
    alike = all(write.operands[2] is slots for write in writes)
    rows = _numbers(news, caches[0].dtype)
    if not alike or len(set(caches)) < len(caches) or rows is None:
        return None
    value, (new_k, new_v) = attention.operands[0], rows
    k = _path(new_k)
    q = _query_path(value, k)
    x, weight, eps = (None, None, None) if q is None else (q.x, q.weight, q.eps)
    cos, sin, layout, _ = k.tables or (None, None, None, None)
    rounding = k.rounding() if q is None or q.weight is None else q.rounding()
    attrs = {"layout": layout, "eps": k.eps if eps is None else eps, "stepwise": rounding}
    op = "append_kv"
    if len(places) > 2:
        op = "scaled_append_kv"
        attrs["tries"] = writes[0].operands[1].operands[0].attr("tries")
    call = make(op, k.x, new_v, *caches, slots, x, cos, sin, weight, k.weight, **attrs)
    found = {write: item(call, index) for index, write in enumerate(writes)}
    if q is not None:
        turned = item(call, len(writes))
        found[attention] = make(attention.op, turned, *attention.args[1:], **dict(attention.attrs))
    return found


def _numbers(news: Sequence[Node], dtype: DType) -> tuple[Node, Node] | None:
    """k and v of what is written: themselves, or what the codes and then the scales of both are
    made of; None where these are of something else.
    """
    if len(news) == 2:
        return news[0], news[1]
    made = [new.operands[0] if new.op == "item" else new for new in news]
    k, v = made[:2]
    pairs = made[2:] == [k, v] and [new.attr("index") for new in news] == [0, 0, 1, 1]
    wanted = (
        make("quantize_rows", k.operands[0], dtype=dtype, tries=k.attr("tries")),
        make("quantize_rows", v.operands[0], dtype=dtype, tries=k.attr("tries")),
    )
    return (k.operands[0], v.operands[0]) if pairs and (k, v) == wanted else None


def _query_path(value: Node, k: _Path) -> _Path | None:
    """The path of q as far as it can be taken together with k's, None where that is not at all."""
    q = _path(value)
    if k.weight is not None and q.weight is not None and (k.eps, k.stepwise) != (q.eps, q.stepwise):
        q = q.without_norm()
    changed = q.tables is not None or q.weight is not None
    fits = q.tables == k.tables and q.x.shape[0] == k.x.shape[0]
    return q if changed and fits else None


def _path(value: Node) -> _Path:
    """The path to a value [T, heads, D]."""
    normed, tables = _rotation(value) or (value, None)
    norm = _below_reshape(normed)
    if norm.op != "rms_norm" or norm.args[1] is None or norm.shape[-1] != value.shape[-1]:
        return _Path(normed, None, None, None, normed, tables)
    x, stepwise = _reshaped(norm.operands[0], *value.shape), norm.attr("stepwise")
    path = _Path(x, norm.args[1], norm.attr("eps"), stepwise, normed, tables)
    return path if path.rounding() == stepwise else path.without_norm()


def _rotation(value: Node) -> tuple[Node, _Tables] | None:
    """(x [T, heads, D], tables) where ``value`` is ``rope(x, …)``, with the heads as they are or in
    other dimensions, one or none.
    """
    rope = _below_reshape(_widened(value))
    if rope.op != "rope" or rope.shape[0] != value.shape[0] or rope.shape[-1] != value.shape[-1]:
        return None
    source, *tables = rope.operands
    rows = value.shape[0]
    half = tables[0].shape[-1]
    if tables[0].shape != (rows, *(1,) * (rope.type.rank - 2), half):
        return None
    if rope.dtype is not value.dtype:
        if source.op != "cast" or source.operands[0].dtype is not value.dtype:
            return None
        source = source.operands[0]
    cos, sin = (_reshaped(table, rows, half) for table in tables)
    return _reshaped(source, *value.shape), (cos, sin, rope.attr("layout"), rope.attr("stepwise"))


def _widened(value: Node) -> Node:
    """The float32 value that ``value`` is rounded from: rope computes in float32 by itself."""
    if value.op != "cast" or value.operands[0].dtype is not DType.F32:
        return value
    return value.operands[0]


def _below_reshape(node: Node) -> Node:
    return node.operands[0] if node.op == "reshape" else node


def _reshaped(node: Node, *shape: Size) -> Node:
    return reshape(_below_reshape(node), *shape)


def _replaced(graph: Graph, replacements: Mapping[Node, Node]) -> Graph:
    """The graph with nodes exchanged for others over its own nodes, which are exchanged in turn."""
    values: dict[Node, Node] = {}
    stack = list(graph.outputs)
    while stack:
        node = stack[-1]
        target = replacements.get(node, node)
        missing = [operand for operand in target.operands if operand not in values]
        if missing:
            stack.extend(missing)
            continue
        values[node] = rebuild(target, values)
        stack.pop()
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))
