"""slot_attention as layers: keys and values written into caches in place, then attention under a
mask of what each query sees, fused where TensorRT has such a kernel.

The mask is said outright, not as a causal kind with lengths: what TensorRT documents of a mask
leaves nothing open, and attention is one kernel a layer either way (with lengths, more before it).
"""

from __future__ import annotations

from ...ir.build import cast, make, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from .norms import HEADS_FIRST
from .writer import Converter, Refusal, Writer

_UNSEEN = -1e30
"""The score of a key that is not seen: no row is without a key that is."""
NOT_FUSED = "attention with {} is computed by parts: TensorRT's fused kernels have none"


def _slot_attention(w: Writer, node: Node) -> tuple[str, ...] | Refusal:
    q, k, v, k_cache, v_cache = node.operands[:5]
    sinks, alibi = (*node.args[6:], None, None)[:2]
    if node.attr("causal") is False:
        return Refusal("attention to later tokens")
    if sinks is not None:
        return Refusal("attention with sinks")
    if alibi is not None and not is_constant(alibi):
        return Refusal("attention with slopes that are computed")
    start = _start(w)
    new = [
        w.add("kv_cache_update", w.value(cache), _heads_first(w, part), start)
        for part, cache in ((k, k_cache), (v, v_cache))
    ]
    mask = _visible(w, node)
    odd = [
        *(("a cap on scores",) if node.attr("softcap") is not None else ()),
        *(("slopes",) if alibi is not None else ()),
        *(("values of another width than keys",) if k.shape[2] != v.shape[2] else ()),
    ]
    if odd:
        w.note(NOT_FUSED.format(odd[0]))
        found = _by_parts(w, node, _heads_first(w, q), new, mask, alibi)
    else:
        scale = w.scalar(_scale_of(node), q.dtype, 4)
        scaled = w.add("elementwise", _heads_first(w, q), scale, op="prod")
        found = w.add("attention", scaled, *new, mask)
    return (w.transposed(found, HEADS_FIRST), *new)


def _heads_first(w: Writer, part: Node) -> str:
    """[T, G, D] as [batch, G, length, D]."""
    if part in w.heads_first:
        return w.heads_first[part]
    return w.transposed(w.operand(part, 4), HEADS_FIRST)


def _scale_of(node: Node) -> float:
    scale = node.attr("scale")
    assert isinstance(scale, float)
    return scale


def _start(w: Writer) -> str:
    """Where each sequence's new tokens begin, i32[batch]."""
    first = w.add("slice", "position_ids", axis=1, start=0, stop=1, step=1)
    return w.add("shuffle", w.add("cast", first, dtype=DType.I32), shape=(-1,))


def _places(w: Writer) -> tuple[str, str]:
    """Positions of queries i32[batch, 1, length, 1], and of keys i32[1, 1, 1, L]."""
    queries = w.add("cast", "position_ids", dtype=DType.I32)
    keys = reshape(make("iota", size=w.max_len, dtype=DType.I32), 1, 1, 1, w.max_len)
    return w.add("shuffle", queries, shape=(0, 1, -1, 1)), w.constant(keys)


def _visible(w: Writer, node: Node) -> str:
    """Which keys each query sees, bool [batch, 1, length, L]: none behind its own."""
    queries, keys = _places(w)
    later = w.add("elementwise", keys, queries, op="greater")
    visible = w.add("unary", later, op="not")
    window = node.attr("window")
    if not isinstance(window, int):
        return visible
    edge = w.add("elementwise", queries, w.scalar(window, DType.I32, 4), op="sub")
    near = w.add("elementwise", keys, edge, op="greater")
    return w.add("elementwise", visible, near, op="and")


def _by_parts(
    w: Writer, node: Node, q: str, caches: list[str], mask: str, alibi: Node | None
) -> str:
    """Attention in products and a softmax over [batch, G, H / G, length, L], in float32."""
    dtype, heads = node.types[0].dtype, node.operands[0].shape[1]
    groups, width = node.operands[3].shape[1], node.operands[0].shape[2]
    assert isinstance(heads, int) and isinstance(groups, int)
    shape = (0, groups, heads // groups, -1, width)
    query = w.wide(w.add("shuffle", q, shape=shape), dtype)
    scaled = w.add("elementwise", query, w.scalar(_scale_of(node), DType.F32, 5), op="prod")
    keys, values = (
        w.wide(w.add("shuffle", cache, shape=(0, groups, 1, w.max_len, -1)), dtype)
        for cache in caches
    )
    # What lies behind a sequence's end may be no number: 0 times it would be none.
    number = w.add("elementwise", w.add("unary", values, op="abs"), _most(w), op="less")
    values = w.add("select", number, values, w.scalar(0.0, DType.F32, 5))
    scores = w.add("matrix_multiply", scaled, keys, transpose=True)
    softcap = node.attr("softcap")
    if isinstance(softcap, float):
        by, back = (w.scalar(x, DType.F32, 5) for x in (1 / softcap, softcap))
        capped = w.add("activation", w.add("elementwise", scores, by, op="prod"), op="tanh")
        scores = w.add("elementwise", capped, back, op="prod")
    if alibi is not None:
        scores = w.add("elementwise", scores, _bias(w, alibi, groups, heads), op="sum")
    seen = w.add("shuffle", mask, shape=(0, 1, 1, -1, w.max_len))
    scores = w.add("select", seen, scores, w.scalar(_UNSEEN, DType.F32, 5))
    weighted = w.add("matrix_multiply", w.add("softmax", scores, axis=4), values, transpose=False)
    flat = w.add("shuffle", weighted, shape=(0, heads, -1, node.types[0].shape[2]))
    return w.narrow(flat, dtype)


def _most(w: Writer) -> str:
    """More than any finite number is, but for the very last."""
    return w.scalar(3.4e38, DType.F32, 5)


def _bias(w: Writer, alibi: Node, groups: int, heads: int) -> str:
    """ALiBi, f32[batch, G, H / G, length, L]: the slope of a head times key minus query."""
    queries, keys = _places(w)
    distance = w.add("elementwise", keys, queries, op="sub")
    wide = w.add("cast", distance, dtype=DType.F32)
    lifted = w.add("shuffle", wide, shape=(0, 1, 1, -1, w.max_len))
    slopes = reshape(cast(alibi, DType.F32), 1, groups, heads // groups, 1, 1)
    return w.add("elementwise", lifted, w.constant(slopes), op="prod")


CONVERTERS: dict[str, Converter] = {"slot_attention": _slot_attention}
