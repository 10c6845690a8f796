"""Data movement. Shapes are the declared ones, so no rule repeats torch's size arithmetic."""

from __future__ import annotations

from ...ir.build import cast, make, permute, reshape
from ...ir.dims import Size, product
from ...ir.node import Node
from .base import Call, Rule


def slice_of(x: Node, dim: int, start: Size, stop: Size, step: int = 1) -> Node:
    """A slice, or ``x`` itself when it is whole."""
    if start == 0 and stop == x.shape[dim] and step == 1:
        return x
    attrs = {} if step == 1 else {"step": step}
    return make("slice", x, dim=dim, start=start, stop=stop, **attrs)


def take(x: Node, dim: int, index: Size) -> Node:
    """Element ``index`` of a dimension, which is dropped; negative ones count from the end."""
    place = x.shape[dim] + index if isinstance(index, int) and index < 0 else index
    picked = slice_of(x, dim, place, place + 1)
    return reshape(picked, *x.shape[:dim], *x.shape[dim + 1 :])


def concat(parts: list[Node], dim: int) -> Node:
    """The parts joined, or the only one."""
    return parts[0] if len(parts) == 1 else make("concat", *parts, dim=dim)


def _same(c: Call) -> Node:
    return c.tensor("self", c.dtype)


def _reshape(c: Call) -> Node:
    return reshape(c.tensor("self"), *c.type.shape)


def _permute(c: Call) -> Node:
    x = c.tensor("self")
    return permute(x, *(d % x.type.rank for d in c.integers("dims", x.type.rank)))


def _transpose(c: Call) -> Node:
    x = c.tensor("self")
    order = list(range(x.type.rank))
    if order:
        a, b = c.axis("dim0", x.type.rank), c.axis("dim1", x.type.rank)
        order[a], order[b] = order[b], order[a]
    return permute(x, *order)


def _t(c: Call) -> Node:
    x = c.tensor("self")
    return permute(x, *reversed(range(x.type.rank)))


def _expand(c: Call) -> Node:
    return expand(c.tensor("self"), c.type.shape)


def expand(x: Node, shape: tuple[Size, ...]) -> Node:
    """``x`` broadcast to a shape; ``x`` itself when it has it."""
    return x if x.shape == shape else make("expand", x, shape=shape)


def _repeat(c: Call) -> Node:
    x, repeats = c.tensor("self"), c.sizes_of("repeats")
    shape = (1,) * (len(repeats) - x.type.rank) + x.shape
    return tiled(x, shape, repeats, each=False)


def tiled(x: Node, shape: tuple[Size, ...], repeats: tuple[Size, ...], *, each: bool) -> Node:
    """Repeats dimensions of ``x`` seen as ``shape``: whole, or element by element when ``each``."""
    apart: list[Size] = []
    grown: list[Size] = []
    merged: list[Size] = []
    for size, count in zip(shape, repeats, strict=True):
        if count == 1:
            apart, grown = [*apart, size], [*grown, size]
        else:
            apart += [size, 1] if each else [1, size]
            grown += [size, count] if each else [count, size]
        merged.append(size * count)
    return reshape(expand(reshape(x, *apart), tuple(grown)), *merged)


def _repeat_interleave(c: Call) -> Node | None:
    if "repeats" not in c.args or isinstance(c.args["repeats"], Node) or not c.given("self"):
        return None
    x = c.tensor("self")
    if not c.given("dim"):
        x = reshape(x, product(x.shape))
    axis = c.axis("dim", x.type.rank) if c.given("dim") else 0
    repeats = tuple(c.size("repeats") if i == axis else 1 for i in range(x.type.rank))
    return tiled(x, x.shape, repeats, each=True)


def _select(c: Call) -> Node:
    x = c.tensor("self")
    return take(x, c.axis("dim", x.type.rank), c.size("index"))


def bounds(c: Call, size: Size, length: Size) -> tuple[Size, Size] | None:
    """Start and stop within ``0 … size`` of a slice of a known length; None when not provable."""
    start: Size = c.size("start") if c.given("start") else 0
    negative = isinstance(start, int) and start < 0
    if negative or not (start == 0 or c.sizes.never_negative(start)):
        stop = c.size("end") if c.given("end") else size
        open_end = isinstance(stop, int) and stop > 1 << 62
        if c.args.get("step", 1) != 1 or not (open_end or stop == size):
            return _two_sided(c, size, start)
        return size - length, size
    if c.args.get("step", 1) == 1:
        if isinstance(start, int) and isinstance(size, int):
            start = min(start, size)
        return start, start + length
    return _two_sided(c, size, start)


def _two_sided(c: Call, size: Size, start: Size) -> tuple[Size, Size] | None:
    stop = c.size("end") if c.given("end") else size
    ends = []
    for end in (start, stop):
        if isinstance(end, int) and end < 0:
            end = size + end
        if isinstance(end, int) and end > 1 << 62:
            end = size
        if isinstance(end, int) and isinstance(size, int):
            end = min(max(end, 0), size)
        elif not c.sizes.never_negative(end):
            return None
        elif c.sizes.never_negative(end - size):
            end = size
        elif not c.sizes.never_negative(size - end):
            return None
        ends.append(end)
    start, stop = ends
    return start, c.sizes.extreme("max", start, stop)


def _slice(c: Call) -> Node | None:
    x = c.tensor("self")
    dim = c.axis("dim", x.type.rank)
    found = bounds(c, x.shape[dim], c.type.shape[dim])
    if found is None:
        return None
    return slice_of(x, dim, *found, c.integer("step") if c.given("step") else 1)


def _narrow(c: Call) -> Node:
    x, start = c.tensor("self"), c.size("start")
    return slice_of(x, c.axis("dim", x.type.rank), start, start + c.size("length"))


def _slice_scatter(c: Call) -> Node | None:
    x, src = c.tensor("self"), c.tensor("src", c.dtype)
    dim = c.axis("dim", x.type.rank)
    found = bounds(c, x.shape[dim], src.shape[dim])
    if found is None or c.args.get("step", 1) != 1:
        return None
    return _replaced(x, src, dim, *found)


def _select_scatter(c: Call) -> Node:
    x, src = c.tensor("self"), c.tensor("src", c.dtype)
    dim, index = c.axis("dim", x.type.rank), c.size("index")
    place = x.shape[dim] + index if isinstance(index, int) and index < 0 else index
    row = reshape(src, *x.shape[:dim], 1, *x.shape[dim + 1 :])
    return _replaced(x, row, dim, place, place + 1)


def _replaced(x: Node, src: Node, dim: int, start: Size, stop: Size) -> Node:
    size = x.shape[dim]
    before = [] if start == 0 else [slice_of(x, dim, 0, start)]
    after = [] if stop == size else [slice_of(x, dim, stop, size)]
    return concat([*before, src, *after], dim)


def _split(c: Call) -> tuple[Node, ...]:
    """split, split_with_sizes and chunk alike: the declared results say where to cut."""
    x = c.tensor("self")
    dim = c.axis("dim", x.type.rank)
    start: Size = 0
    parts = []
    for result in c.results:
        length = result.shape[dim] if result is not None else 0
        parts.append(slice_of(x, dim, start, start + length))
        start = start + length
    return tuple(parts)


def _unbind(c: Call) -> tuple[Node, ...]:
    x = c.tensor("self")
    dim = c.axis("dim", x.type.rank)
    return tuple(take(x, dim, i) for i in range(len(c.results)))


def _cat(c: Call) -> Node:
    # torch skips legacy empty vectors among tensors of another rank
    parts = [x for x in c.tensors("tensors") if x.type.rank == c.type.rank]
    return concat([cast(x, c.dtype) for x in parts], c.axis("dim", c.type.rank))


def _stack(c: Call) -> Node:
    dim = c.axis("dim", c.type.rank)
    parts = [cast(x, c.dtype) for x in c.tensors("tensors")]
    return concat([reshape(x, *x.shape[:dim], 1, *x.shape[dim:]) for x in parts], dim)


def _pad(c: Call) -> Node | None:
    x, pads = c.tensor("self"), list(c.sizes_of("pad"))
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)][::-1]
    pairs = [(0, 0)] * (x.type.rank - len(pairs)) + pairs
    for dim, (before, after) in enumerate(pairs):
        cut = [-a if isinstance(a, int) and a < 0 else 0 for a in (before, after)]
        x = slice_of(x, dim, cut[0], x.shape[dim] - cut[1])
    grown = tuple(tuple(0 if isinstance(a, int) and a < 0 else a for a in pair) for pair in pairs)
    value = c.number("value") if c.given("value") else 0
    return make("pad", x, pads=grown, value=float(value)) if any(map(any, grown)) else x


def _flip(c: Call) -> Node:
    x = c.tensor("self")
    return make("flip", x, dims=c.axes("dims", x.type.rank))


def _roll(c: Call) -> Node | None:
    x, shifts = c.tensor("self"), c.sizes_of("shifts")
    if not c.given("dims") or c.args["dims"] == []:
        return None
    for shift, dim in zip(shifts, c.integers("dims", len(shifts)), strict=True):
        axis, size = dim % x.type.rank, x.shape[dim]
        if not isinstance(shift, int) or not isinstance(size, int):
            return None
        cut = -shift % size if size else 0
        if cut:
            x = concat([slice_of(x, axis, cut, size), slice_of(x, axis, 0, cut)], axis)
    return x


def _copy(c: Call) -> Node:
    return expand(c.tensor("src", c.dtype), c.type.shape)


_IDENTITIES = (
    *("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "lift_fresh", "positive"),
    *("to", "_to_copy", "type_as", "view_of", "resolve_conj", "resolve_neg"),
)
_RESHAPES = (
    *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"),
    *("_reshape_alias", "ravel", "view_copy", "unsqueeze_copy", "squeeze_copy", "view_as"),
)
RULES: dict[str, Rule] = {
    **{f"aten.{op}": _same for op in _IDENTITIES},
    **{f"aten.{op}": _reshape for op in _RESHAPES},
    "aten.dropout": lambda c: None if c.flag("train") else c.tensor("input"),
    "aten.native_dropout": lambda c: None if c.flag("train") else (c.tensor("input"), None),
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.t": _t,
    "aten.numpy_T": _t,
    "aten.expand": _expand,
    "aten.expand_as": _expand,
    "aten.broadcast_to": _expand,
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.select": _select,
    "aten.slice": _slice,
    "aten.narrow": _narrow,
    "aten.slice_scatter": _slice_scatter,
    "aten.select_scatter": _select_scatter,
    "aten.split": _split,
    "aten.split_with_sizes": _split,
    "aten.chunk": _split,
    "aten.unbind": _unbind,
    "aten.cat": _cat,
    "aten.concat": _cat,
    "aten.stack": _stack,
    "aten.constant_pad_nd": _pad,
    "aten.flip": _flip,
    "aten.roll": _roll,
    "aten.copy": _copy,
}
