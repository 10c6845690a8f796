"""slot_attention as ONNX: GroupQueryAttention on caches in place, or by parts where it declines.

GroupQueryAttention (com.microsoft) takes q, k, v as [B, S, heads * D], caches [B, G, L, D] as past
and present in one buffer, ``seqlens_k = seq_lens - 1``, and rotates q and k itself from tables over
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ir.dtypes import DType
from ...ir.node import Node
from .attention import (
    Scores,
    alibi_bias,
    attend,
    computes,
    iota,
    repeat_heads,
    scale_of,
    sink_column,
    softcap_of,
    visibility,
)
from .emitter import ELEMENT_TYPES, MICROSOFT, Converter, Emitter, Refusal
from .tables import Tables, position_tables

# Positions of optional operands of GroupQueryAttention.
_COS, _SIN, _POSITIONS, _BIAS, _SINK, _QUERY_LENGTHS = 7, 8, 9, 10, 11, 16


@dataclass(frozen=True, slots=True)
class Rows:
    """What the kernels need to know of the B rows, computed once a graph.

    ``batch``, ``steps`` and ``longest`` are i64[1], ``lengths`` i64[B], ``last`` and ``counts``
    i32[B].
    """

    batch: str
    steps: str
    lengths: str
    last: str
    counts: str
    longest: str


def slot_attention(
    e: Emitter,
    node: Node,
    q: str,
    k: str,
    v: str,
    k_cache: str,
    v_cache: str,
    seq_lens: str,
    sinks: str = "",
    alibi: str = "",
    *,
    narrow: bool = False,
) -> tuple[str, ...] | Refusal:
    """Output and caches; ``narrow`` takes 16-bit types too, whose results are no engine's."""
    refusal = None if narrow and is_narrow(node) else computes(node)
    if refusal:
        return refusal
    rows = rows_of(e, node, seq_lens)
    given = {"k_cache": k_cache, "v_cache": v_cache, "sinks": sinks, "alibi": alibi}
    if _grouped_takes(node):
        return _grouped(e, node, rows, (q, k, v), given)
    return by_parts(e, node, rows, (q, k, v), given)


def rows_of(e: Emitter, node: Node, seq_lens: str) -> Rows:
    """The rows of a slot_attention; the same names for all nodes of a graph."""
    i64, i32 = ELEMENT_TYPES[DType.I64], ELEMENT_TYPES[DType.I32]
    zero = e.ints(0)

    def once(name: str, make: str, *inputs: str, **attrs: Any) -> str:
        return e.once(("rows", seq_lens, name), lambda: e.op(make, *inputs, **attrs))

    tokens = e.size(node.operands[0].shape[0])
    batch = once("batch", "Shape", seq_lens)
    steps = once("steps", "Div", tokens, batch)
    lengths = once("lengths", "Cast", seq_lens, to=i64)
    longest = once("longest", "ReduceMax", lengths, zero, keepdims=1)
    longest = once("room", "Max", longest, steps)  # idle rows alone leave none
    last = once("last", "Max", once("less", "Sub", lengths, e.ints(1)), zero)
    last = once("last32", "Cast", last, to=i32)
    counts = once("counts", "Min", lengths, steps)  # an idle row, of length 0, brings no token
    counts = once("counts32", "Cast", counts, to=i32)
    return Rows(batch, steps, lengths, last, counts, longest)


def _grouped_takes(node: Node) -> bool:
    q, k, v = node.operands[:3]
    sizes = (*q.shape[1:], *k.shape[1:], *v.shape[1:])
    single = node.types[0].dtype is DType.F32 or is_narrow(node)
    if not single or not all(isinstance(s, int) for s in sizes):
        return False
    width = q.shape[2]
    assert isinstance(width, int)
    return bool(node.attr("causal")) and width == v.shape[2] and width % 8 == 0


def _grouped(
    e: Emitter, node: Node, rows: Rows, qkv: tuple[str, str, str], given: dict[str, str]
) -> tuple[str, ...]:
    q_node, k_node = node.operands[:2]
    heads, kv_heads, width = q_node.shape[1], k_node.shape[1], q_node.shape[2]
    dtype = node.types[0].dtype
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(width, int)
    tables = position_tables(e, node)
    fresh = _fresh(e, node, rows, qkv, tables)
    operands = [*fresh, given["k_cache"], given["v_cache"], rows.last, _total(e, rows)]
    operands += [""] * (_QUERY_LENGTHS + 1 - len(operands))
    operands[_QUERY_LENGTHS] = rows.counts
    if tables is not None:
        operands[_COS], operands[_SIN] = tables.cos, tables.sin
        operands[_POSITIONS] = _as_rows(e, e.value(tables.positions), rows, ())
    sinks, alibi = (*node.args[6:], None, None)[:2]
    operands[_SINK] = _as(e, given["sinks"], sinks, dtype)
    if alibi is not None:
        operands[_BIAS] = slot_bias(e, rows, given["alibi"], alibi.dtype, dtype)
    window = node.attr("window")
    out, *caches = e.ops(
        "GroupQueryAttention",
        *operands,
        count=3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale_of(node),
        softcap=softcap_of(node),
        local_window_size=window if isinstance(window, int) else None,
        do_rotary=int(tables is not None),
        rotary_interleaved=int(tables is not None and tables.interleaved),
    )
    # The op leaves the rows that bring no token as it found the memory.
    out = e.op("Where", _idle(e, rows, (1, 2)), e.scalar(0.0, dtype), out)
    return (e.view(out, (q_node.shape[0], heads, width)), *caches)


def _idle(e: Emitter, rows: Rows, axes: tuple[int, ...]) -> str:
    """Which rows are idle, bool [B] with axes of size one."""

    def make() -> str:
        idle = e.op("Equal", rows.lengths, e.scalar(0, DType.I64))
        return e.op("Unsqueeze", idle, e.ints(*axes))

    return e.once(("rows", rows.lengths, "idle", axes), make)


def _total(e: Emitter, rows: Rows) -> str:
    """The longest length as the i32 scalar that the op takes."""

    def make() -> str:
        scalar = e.op("Squeeze", rows.longest, e.ints(0))
        return e.op("Cast", scalar, to=ELEMENT_TYPES[DType.I32])

    return e.once(("rows", rows.longest, "total"), make)


def _fresh(
    e: Emitter, node: Node, rows: Rows, qkv: tuple[str, str, str], tables: Tables | None
) -> tuple[str, str, str]:
    """q, k, v as [B, S, heads * D], all in one if one projection made them, before its rotation."""
    nodes = tables.unrotated if tables is not None else node.operands[:3]
    source = _one_projection(e, nodes)
    if source is not None:
        return _as_rows(e, e.value(source), rows, (source.shape[1],)), "", ""
    names = [e.value(part) for part in nodes] if tables is not None else list(qkv)
    q, k, v = (
        _as_rows(e, name, rows, (part.shape[1] * part.shape[2],))
        for name, part in zip(names, nodes, strict=True)
    )
    return q, k, v


def _one_projection(e: Emitter, parts: tuple[Node, ...]) -> Node | None:
    """The value [T, (H + 2 G) D] that q, k and v are consecutive slices of."""
    source: Node | None = None
    edge = 0
    for part in parts:
        piece = part.operands[0] if part.op == "reshape" else part
        heads, width = part.shape[1:]
        if piece.op != "slice" or piece.type.rank != 2 or piece.attr("dim") != 1:
            return None
        if piece.attr("start") != edge or piece.attr("step") != 1:
            return None
        if source not in (None, piece.operands[0]) or piece.shape[1] != heads * width:
            return None
        source = piece.operands[0]
        stop = piece.attr("stop")
        assert isinstance(stop, int)
        edge = stop
    fits = source is not None and source.shape[1] == edge and source in e.values
    return source if fits else None


def _as_rows(e: Emitter, x: str, rows: Rows, widths: tuple[object, ...]) -> str:
    """A token-major value as [B, S, *widths]."""
    tail = tuple(int(str(width)) for width in widths)
    target = e.once(
        ("rows", rows.batch, "shape", tail),
        lambda: e.op("Concat", rows.batch, e.ints(-1, *tail), axis=0),
    )
    source = e.sources.get(x, x)
    return e.once(("view", source, target), lambda: e.op("Reshape", source, target))


def is_narrow(node: Node) -> bool:
    """Whether attention is over 16-bit numbers."""
    return node.types[0].dtype in (DType.F16, DType.BF16)


def _as(e: Emitter, name: str, node: Node | None, dtype: DType) -> str:
    if node is None or node.dtype is dtype:
        return name
    return e.op("Cast", name, to=ELEMENT_TYPES[dtype])


def distance_of(e: Emitter, rows: Rows) -> str:
    """Query position - key position of each row, i64[B, 1, S, L] with L the longest length."""

    def make() -> str:
        steps = e.op("Sub", e.op("Unsqueeze", rows.lengths, e.ints(1)), rows.steps)
        queries = e.op("Add", steps, iota(e, e.ints(0), rows.steps))
        return e.op("Sub", e.op("Unsqueeze", queries, e.ints(1, 3)), _keys(e, rows))

    return e.once(("rows", rows.lengths, "distance"), make)


def _keys(e: Emitter, rows: Rows) -> str:
    return e.once(("rows", rows.lengths, "keys"), lambda: iota(e, e.ints(0), rows.longest))


def slot_bias(e: Emitter, rows: Rows, alibi: str, dtype: DType, wanted: DType) -> str:
    """ALiBi of each row, [B, H, S, L]."""
    distance = distance_of(e, rows)
    key = ("rows", rows.lengths, "alibi", alibi, wanted)
    return e.once(key, lambda: alibi_bias(e, alibi, dtype, distance, wanted))


def by_parts(
    e: Emitter, node: Node, rows: Rows, qkv: tuple[str, str, str], given: dict[str, str]
) -> tuple[str, ...]:
    """Output and caches by ops of the standard alone, in every form that the IR has; 16-bit ones
    are computed in float32, as the IR computes them.
    """
    own, heads = node.types[0].dtype, node.operands[0].shape[1]
    dtype = DType.F32 if is_narrow(node) else own
    q, k, v = (
        heads_first(e, rows, name, part) for name, part in zip(qkv, node.operands[:3], strict=True)
    )
    caches = [_write(e, rows, given["k_cache"], k), _write(e, rows, given["v_cache"], v)]
    zero, axis = e.ints(0), e.ints(2)
    keys, values = (e.op("Slice", cache, zero, rows.longest, axis) for cache in caches)
    if own is not dtype:
        q, keys, values = (e.op("Cast", x, to=ELEMENT_TYPES[dtype]) for x in (q, keys, values))
    distance = distance_of(e, rows)
    lengths = e.op("Unsqueeze", rows.lengths, e.ints(1, 2, 3))
    written = e.op("Less", _keys(e, rows), lengths)  # [B, 1, 1, L]
    # What lies behind a sequence's end may be anything, NaN too: 0 times it would not be 0.
    behind = e.scalar(0.0, dtype)
    values = e.op("Where", e.op("Reshape", written, _column(e)), values, behind)
    visible = visibility(e, node, distance)
    visible = e.op("And", visible, written) if visible else written
    sinks, alibi = (*node.args[6:], None, None)[:2]
    bias = "" if alibi is None else slot_bias(e, rows, given["alibi"], alibi.dtype, dtype)
    column = "" if sinks is None else sink_column(e, given["sinks"], sinks.dtype, dtype)
    how = Scores(dtype, scale_of(node), softcap_of(node), visible, bias, column)
    k_shape, v_shape = node.operands[3].shape, node.operands[4].shape
    out = attend(
        e,
        q,
        repeat_heads(e, keys, k_shape, heads),
        repeat_heads(e, values, v_shape, heads),
        how,
    )
    out = e.op("Transpose", out, perm=[0, 2, 1, 3])
    if own is not dtype:
        out = e.op("Cast", out, to=ELEMENT_TYPES[own])
    return (e.view(out, node.types[0].shape), *caches)


def _column(e: Emitter) -> str:
    """Turns [B, 1, 1, L] into [B, 1, L, 1]."""
    return e.ints(0, 1, -1, 1)


def heads_first(e: Emitter, rows: Rows, name: str, part: Node) -> str:
    """[T, G, D] as [B, G, S, D]."""
    return e.op("Transpose", _as_rows(e, name, rows, part.shape[1:]), perm=[0, 2, 1, 3])


def _write(e: Emitter, rows: Rows, cache: str, new: str) -> str:
    """The cache with each row's new tokens at its end; an idle row keeps what it had."""
    start = e.op("Max", e.op("Sub", rows.lengths, rows.steps), e.scalar(0, DType.I64))
    old = e.op("Slice", cache, e.ints(0), rows.steps, e.ints(2))
    kept = e.op("Where", _idle(e, rows, (1, 2, 3)), old, new)
    return e.op("TensorScatter", cache, kept, start, axis=2)


CONVERTERS: dict[str, Converter] = {"slot_attention": slot_attention}
