"""Data movement and sizes as ONNX."""

from __future__ import annotations

from ...ir.dims import Dim, Size
from ...ir.dtypes import DType
from ...ir.node import Node
from .emitter import ELEMENT_TYPES, Converter, Emitter

_END = 2**31 - 1
_BEYOND = 2**62  # no dimension is as long


def _dim(node: Node) -> int:
    dim = node.attr("dim")
    assert isinstance(dim, int)
    return dim


def _sizes(node: Node, name: str) -> tuple[Size, ...]:
    value = node.attr(name)
    assert isinstance(value, tuple)
    return value  # type: ignore[return-value]


def _reshape(e: Emitter, node: Node, x: str) -> str:
    return e.view(x, node.shape)


def _permute(e: Emitter, node: Node, x: str) -> str:
    return e.op("Transpose", x, perm=list(_sizes(node, "dims")))


def _expand(e: Emitter, node: Node, x: str) -> str:
    return e.op("Expand", x, e.shape(node.shape))


def _slice(e: Emitter, node: Node, x: str) -> str:
    parts = _tiling(e, node)
    if parts:
        return _split(e, node, x, parts)
    start, stop = node.attr("start"), node.attr("stop")
    assert isinstance(start, int | Dim) and isinstance(stop, int | Dim)
    step = node.attr("step")
    assert isinstance(step, int)
    return e.op("Slice", x, e.size(start), e.size(stop), e.ints(_dim(node)), e.ints(step))


def _tiling(e: Emitter, node: Node) -> list[Node]:
    """The slices that cut one dimension of a value into pieces, in order; none if they do not."""
    source, dim = node.operands[0], _dim(node)
    if node not in e.members:
        return []
    parts = [u for u in e.graph.users[source] if u.op == "slice" and u.attr("dim") == dim]
    bounds: list[tuple[int, int, Node]] = []
    for part in parts:
        start, stop = part.attr("start"), part.attr("stop")
        if part.attr("step") == 1 and isinstance(start, int) and isinstance(stop, int):
            bounds.append((start, stop, part))
    bounds.sort(key=lambda bound: bound[0])
    edges = [0, *(stop for _, stop, _ in bounds)]
    tiles = all(start == edge for (start, _, _), edge in zip(bounds, edges, strict=False))
    pieces = [part for _, _, part in bounds]
    inside = len(pieces) > 1 and all(part in e.members for part in pieces)
    covers = tiles and edges[-1] == source.shape[dim]
    return pieces if covers and inside and node in pieces else []


def _split(e: Emitter, node: Node, x: str, parts: list[Node]) -> str:
    widths = [part.shape[_dim(node)] for part in parts]
    sizes = e.ints(*widths)  # type: ignore[arg-type]
    names = tuple(e.shared.unique(e.names.get(part, f"{e.stem}.part")) for part in parts)
    e.add("Split", (x, sizes), names, axis=_dim(node))
    e.values.update((part, (name,)) for part, name in zip(parts, names, strict=True))
    return names[parts.index(node)]


def _concat(e: Emitter, node: Node, *xs: str) -> str:
    return e.op("Concat", *xs, axis=_dim(node))


def _pad(e: Emitter, node: Node, x: str) -> str:
    pads = node.attr("pads")
    assert isinstance(pads, tuple)
    amounts = [pair[side] for side in (0, 1) for pair in pads]  # type: ignore[index]
    value = e.scalar(_number(node.attr("value"), node.dtype), node.dtype)
    return e.op("Pad", x, e.shape(amounts), value)  # type: ignore[arg-type]


def _number(value: object, dtype: DType) -> float | int | bool:
    assert isinstance(value, int | float)
    return float(value) if dtype.is_float else bool(value) if dtype is DType.BOOL else int(value)


def _flip(e: Emitter, node: Node, x: str) -> str:
    dims = [d for d in _sizes(node, "dims") if isinstance(d, int)]
    if not dims:
        return e.op("Identity", x)
    count = len(dims)
    bounds = (e.ints(*[-1] * count), e.ints(*[-_END] * count))
    return e.op("Slice", x, *bounds, e.ints(*dims), e.ints(*[-1] * count))


def _gather(e: Emitter, node: Node, x: str, index: str) -> str:
    dim, source = _dim(node), node.operands[0]
    wider = [d for d, s in enumerate(node.shape) if d != dim and s != source.shape[d]]
    for d in wider:  # GatherElements wants the same sizes off the axis
        x = e.op("Slice", x, e.ints(0), e.size(node.shape[d]), e.ints(d))
    return e.op("GatherElements", x, _index(e, node, index), axis=dim)


def _index_select(e: Emitter, node: Node, x: str, index: str) -> str:
    return e.op("Gather", x, _index(e, node, index), axis=_dim(node))


def _embedding(e: Emitter, node: Node, weight: str, ids: str) -> str:
    return e.op("Gather", weight, _index(e, node, ids), axis=0)


def _index(e: Emitter, node: Node, index: str) -> str:
    """The index as i64; below 0, where ONNX counts from the end, out of all bounds: an error."""
    if node.operands[1].dtype is not DType.I64:
        index = e.op("Cast", index, to=ELEMENT_TYPES[DType.I64])
    if _counts_up(node.operands[1]):
        return index
    below = e.op("Less", index, e.scalar(0, DType.I64))
    return e.op("Where", below, e.scalar(_BEYOND, DType.I64), index)


def _counts_up(index: Node) -> bool:
    """Whether an index is a range, moved about: never below 0."""
    while index.op in ("reshape", "expand", "permute", "slice"):
        index = index.operands[0]
    value = index.attr("value")
    return index.op == "iota" or (index.op == "const" and isinstance(value, int) and value >= 0)


def _dim_value(e: Emitter, node: Node) -> str:
    size = node.attr("size")
    assert isinstance(size, int | Dim)
    scalar = e.op("Squeeze", e.size(size), e.ints(0))
    return e.op("Cast", scalar, to=ELEMENT_TYPES[node.dtype])


def _iota(e: Emitter, node: Node) -> str:
    zero, one = e.scalar(0, DType.I64), e.scalar(1, DType.I64)
    stop = e.op("Squeeze", e.size(node.shape[0]), e.ints(0))
    return e.op("Cast", e.op("Range", zero, stop, one), to=ELEMENT_TYPES[node.dtype])


CONVERTERS: dict[str, Converter] = {
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
    "flip": _flip,
    "gather": _gather,
    "index_select": _index_select,
    "embedding": _embedding,
    "dim_value": _dim_value,
    "iota": _iota,
}
