"""Data movement in one spelling: reshapes outermost and merged, permutes merged, slices composed.

A permute that moves sizes of one only is a reshape. A reduction keeps its dimensions.
"""

from __future__ import annotations

from ..ir.build import make, permute, reshape
from ..ir.dims import Size, is_nonnegative
from ..ir.node import Node
from .match import value_of
from .rewrite import Context, Rule


def same_shape(node: Node, context: Context) -> Node | None:
    """``reshape``, ``expand``, ``slice`` or ``permute`` that leaves all as it is → its operand."""
    x = node.operands[0]
    if node.op == "permute":
        return x if node.attr("dims") == tuple(range(x.type.rank)) else None
    return x if x.type == node.type and (node.attr("step") or 1) == 1 else None


def reshape_twice(node: Node, context: Context) -> Node | None:
    """``reshape(reshape(x)) → reshape(x)``."""
    inner = node.operands[0]
    return reshape(inner.operands[0], *node.shape) if inner.op == "reshape" else None


def permute_twice(node: Node, context: Context) -> Node | None:
    """``permute(permute(x, p), q) → permute(x, p[q])``."""
    inner = node.operands[0]
    if inner.op != "permute":
        return None
    first, second = _dims(inner), _dims(node)
    return permute(inner.operands[0], *(first[d] for d in second))


def permute_of_ones(node: Node, context: Context) -> Node | None:
    """``permute(x: [1, S, D], (1, 0, 2)) → reshape(x, (S, 1, D))``: sizes of one may move
    freely.
    """
    x = node.operands[0]
    moved = [d for d in _dims(node) if x.shape[d] != 1]
    return reshape(x, *node.shape) if moved == sorted(moved) else None


def permute_of_reshape(node: Node, context: Context) -> Node | None:
    """``permute(reshape(x))`` → ``reshape(permute(x))`` where the reshape adds or drops ones
    only.
    """
    inner = node.operands[0]
    if inner.op != "reshape":
        return None
    x = inner.operands[0]
    source = [axis for axis, size in enumerate(x.shape) if size != 1]
    target = [axis for axis, size in enumerate(inner.shape) if size != 1]
    if [x.shape[a] for a in source] != [inner.shape[a] for a in target]:
        return None
    ones = [axis for axis, size in enumerate(x.shape) if size == 1]
    moved = [source[target.index(d)] for d in _dims(node) if d in target]
    return reshape(permute(x, *ones, *moved), *node.shape)


def expand_twice(node: Node, context: Context) -> Node | None:
    """``expand(expand(x)) → expand(x)``; ``expand(reshape(x, (1, 1, D))) → expand(x)``."""
    inner = node.operands[0]
    if inner.op == "expand":
        return make("expand", inner.operands[0], shape=node.shape)
    if inner.op != "reshape":
        return None
    x = inner.operands[0]
    added = inner.type.rank - x.type.rank
    if added > 0 and inner.shape == (1,) * added + x.shape:
        return make("expand", x, shape=node.shape)
    return None


def slice_to_last(node: Node, context: Context) -> Node | None:
    """``slice(x: [8], 0, 8, step=2) → slice(x, 0, 7, step=2)``: a stride ends with the last
    element that it takes.
    """
    step, dim = _step(node), node.attr("dim")
    assert isinstance(dim, int)
    if step == 1 or node.shape[dim] == 0:
        return None
    stop = _start(node) + (node.shape[dim] - 1) * step + 1
    return (
        None
        if stop == node.attr("stop")
        else make("slice", *node.args, **{**dict(node.attrs), "stop": stop})
    )


def reshape_of_expand(node: Node, context: Context) -> Node | None:
    """``reshape(expand(x))`` → ``expand(reshape(x))`` where the reshape adds or drops ones only."""
    wide = node.operands[0]
    if wide.op != "expand" or not _only_ones(node):
        return None
    x = wide.operands[0]
    narrow = (1,) * (wide.type.rank - x.type.rank) + x.shape
    kept = iter([size for size, full in zip(narrow, wide.shape, strict=True) if full != 1])
    return make(
        "expand", reshape(x, *(1 if s == 1 else next(kept) for s in node.shape)), shape=node.shape
    )


def slice_of_expand(node: Node, context: Context) -> Node | None:
    """``slice(expand(x)) → expand(x)`` along a broadcast dimension, else ``expand(slice(x))``."""
    inner = node.operands[0]
    if inner.op != "expand":
        return None
    x, dim = inner.operands[0], node.attr("dim")
    assert isinstance(dim, int)
    own = dim - (inner.type.rank - x.type.rank)
    if own >= 0 and x.shape[own] != 1:
        x = make("slice", x, **{**dict(node.attrs), "dim": own})
    return make("expand", x, shape=node.shape)


def slice_twice(node: Node, context: Context) -> Node | None:
    """``slice(slice(x))`` along one dimension → one slice; along two, the first dimension goes
    first.
    """
    inner = node.operands[0]
    if inner.op != "slice" or node.type.numel == 0:
        return None
    dim, inner_dim, x = node.attr("dim"), inner.attr("dim"), inner.operands[0]
    assert isinstance(dim, int) and isinstance(inner_dim, int)
    if dim < inner_dim:
        first = make("slice", x, **dict(node.attrs))
        return make("slice", first, **dict(inner.attrs))
    if dim > inner_dim:
        return None
    begin, step = _start(node), _step(node)
    by = _step(inner)
    start = _start(inner) + begin * by
    count = node.shape[dim]
    stop = start + count if step * by == 1 else start + (count - 1) * (step * by) + 1
    return make("slice", x, dim=dim, start=start, stop=stop, step=step * by)


def slice_of_concat(node: Node, context: Context) -> Node | None:
    """``slice(concat(a, b))`` → what it covers of a and b, when the bounds say so for all sizes."""
    inner = node.operands[0]
    dim = node.attr("dim")
    if inner.op != "concat" or inner.attr("dim") != dim or _step(node) != 1:
        return None
    assert isinstance(dim, int)
    start = _start(node)
    offset: Size = 0
    parts: list[Node] = []
    for part in inner.operands:
        end = offset + part.shape[dim]
        low, high = start - offset, _stop(node) - offset
        kept = _overlap(low, high, part.shape[dim])
        if kept is None:
            return None
        if kept[0] != kept[1]:
            parts.append(make("slice", part, dim=dim, start=kept[0], stop=kept[1]))
        offset = end
    joined = parts[0] if len(parts) == 1 else make("concat", *parts, dim=dim) if parts else None
    return joined if joined is not None and joined.type == node.type else None


def flat_concat(node: Node, context: Context) -> Node | None:
    """``concat(concat(a, b), c) → concat(a, b, c)``; empty parts vanish; one part is no concat."""
    dim = node.attr("dim")
    assert isinstance(dim, int)
    parts: list[Node] = []
    for part in node.operands:
        nested = part.op == "concat" and part.attr("dim") == dim
        parts += part.operands if nested else [part]
    parts = [part for part in parts if part.shape[dim] != 0] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    return make("concat", *parts, dim=dim) if tuple(parts) != node.operands else None


def concat_of_slices(node: Node, context: Context) -> Node | None:
    """``concat(slice(x, 0, a), slice(x, a, b)) → slice(x, 0, b)``."""
    dim = node.attr("dim")
    parts = list(node.operands)
    for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)):
        both = all(p.op == "slice" and p.attr("dim") == dim and _step(p) == 1 for p in (a, b))
        if both and a.operands == b.operands and a.attr("stop") == _start(b):
            joined = make("slice", *a.operands, dim=dim, start=_start(a), stop=b.attr("stop"))
            parts[i : i + 2] = [joined]
            return parts[0] if len(parts) == 1 else make("concat", *parts, dim=dim)
    return None


def keep_dimensions(node: Node, context: Context) -> Node | None:
    """``mean(x) → reshape(mean(x, keepdim=True))``, so that there is one spelling of a
    reduction.
    """
    if node.attr("keepdim"):
        return None
    kept = make(node.op, *node.args, **{**dict(node.attrs), "keepdim": True})
    return reshape(kept, *node.shape)


def rows_by_gather(node: Node, context: Context) -> Node | None:
    """``gather(expand(table [N, D]), expand(ids [..., 1]), dim=-2) → embedding(table, ids)``."""
    table, index = node.operands
    dim, rank = node.attr("dim"), node.type.rank
    while table.op == "expand" or (table.op == "reshape" and _only_ones(table)):
        table = table.operands[0]
    whole = table.type.rank == 2 and table.shape[-1] == node.shape[-1]
    if rank < 2 or dim != rank - 2 or not whole or index.op != "expand":
        return None
    ids = index.operands[0]
    if ids.type.rank != rank or ids.shape[-1] != 1 or ids.shape[:-1] != node.shape[:-1]:
        return None
    if node.operands[0].shape[:-2] != node.shape[:-2]:
        return None
    return make("embedding", table, reshape(ids, *node.shape[:-1]))


def rows_by_index(node: Node, context: Context) -> Node | None:
    """``index_select(table [N, D], ids, dim=0) → embedding(table, ids)``."""
    table, ids = node.operands
    return make("embedding", table, ids) if node.attr("dim") == 0 and table.type.rank == 2 else None


def index_of_constant(node: Node, context: Context) -> Node | None:
    """``index_select(x, expand(i64(2), (1,)), dim=d) → slice(x, d, 2, 3)``."""
    x, index = node.operands
    at, dim = value_of(index), node.attr("dim")
    if at is None or index.type.numel != 1 or not isinstance(dim, int):
        return None
    return reshape(make("slice", x, dim=dim, start=int(at), stop=int(at) + 1), *node.shape)


def _only_ones(node: Node) -> bool:
    """Whether a reshape adds or drops sizes of one only."""
    before, after = ([s for s in n.shape if s != 1] for n in (node.operands[0], node))
    return before == after


def _overlap(low: Size, high: Size, size: Size) -> tuple[Size, Size] | None:
    """Bounds of [low, high) within [0, size), None when they depend on the symbols."""
    if is_nonnegative(-high) or is_nonnegative(low - size):
        return (0, 0)
    if is_nonnegative(-low):
        low = 0
    if is_nonnegative(high - size):
        high = size
    ordered = is_nonnegative(low) and is_nonnegative(high - low) and is_nonnegative(size - high)
    return (low, high) if ordered else None


def _dims(node: Node) -> tuple[int, ...]:
    dims = node.attr("dims")
    assert isinstance(dims, tuple)
    return tuple(d for d in dims if isinstance(d, int))


def _start(node: Node) -> Size:
    return node.attr("start")  # type: ignore[return-value]


def _stop(node: Node) -> Size:
    return node.attr("stop")  # type: ignore[return-value]


def _step(node: Node) -> int:
    step = node.attr("step")
    return step if isinstance(step, int) else 1


_REDUCTIONS = ("sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin")
SHAPE_RULES: tuple[Rule, ...] = (
    Rule("same_shape", ("reshape", "expand", "slice", "permute"), same_shape),
    Rule("reshape_twice", ("reshape",), reshape_twice),
    Rule("permute_twice", ("permute",), permute_twice),
    Rule("permute_of_ones", ("permute",), permute_of_ones),
    Rule("permute_of_reshape", ("permute",), permute_of_reshape),
    Rule("expand_twice", ("expand",), expand_twice),
    Rule("slice_to_last", ("slice",), slice_to_last),
    Rule("reshape_of_expand", ("reshape",), reshape_of_expand),
    Rule("slice_of_expand", ("slice",), slice_of_expand),
    Rule("slice_twice", ("slice",), slice_twice),
    Rule("slice_of_concat", ("slice",), slice_of_concat),
    Rule("flat_concat", ("concat",), flat_concat),
    Rule("concat_of_slices", ("concat",), concat_of_slices),
    Rule("keep_dimensions", _REDUCTIONS, keep_dimensions),
    Rule("rows_by_gather", ("gather",), rows_by_gather),
    Rule("index_of_constant", ("index_select",), index_of_constant),
    Rule("rows_by_index", ("index_select",), rows_by_index),
)
