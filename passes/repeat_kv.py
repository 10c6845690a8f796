"""Grouped heads: K and V that a model repeats for its query heads are given to attention as
they were.
"""

from __future__ import annotations

from ..ir.build import make, permute, reshape
from ..ir.dims import product
from ..ir.node import Node
from .rewrite import Context

MAX_DEPTH = 12


def grouped_heads(node: Node, context: Context) -> Node | None:
    """``attention(q, repeat(k), repeat(v)) → attention(q, k, v)``; k and v [B, G, L, D],
    repeated to [B, H, L, D].
    """
    q, k, v = node.operands[:3]
    few_k, few_v = unrepeated(k, 1), unrepeated(v, 1)
    if few_k is None or few_v is None or few_k.shape[1] != few_v.shape[1]:
        return None
    return make("attention", q, few_k, few_v, *node.args[3:], **dict(node.attrs))


def unrepeated(node: Node, axis: int, depth: int = MAX_DEPTH) -> Node | None:
    """``node`` before each entry along ``axis`` was repeated, None when none was.

    The repetition is ``reshape(expand(x [..., G, 1, ...]))`` to [..., G·n, ...], below permutes
    and rotary embeddings.
    """
    if depth == 0:
        return None
    x = node.operands[0] if node.operands else None
    match node.op:
        case "reshape":
            return _merged(node, axis)
        case "expand" if x is not None and x.type.rank == node.type.rank and x.shape[axis] == 1:
            same = (*node.shape[:axis], 1, *node.shape[axis + 1 :]) == x.shape
            return x if same and node.shape[axis] != 1 else None
        case "permute":
            dims = node.attr("dims")
            assert isinstance(dims, tuple) and isinstance(dims[axis], int)
            inner = unrepeated(node.operands[0], dims[axis], depth - 1)  # type: ignore[arg-type]
            return inner and permute(inner, *dims)  # type: ignore[arg-type]
        case "rope":
            tables = node.operands[1:]
            own = [axis - (node.type.rank - t.type.rank) for t in tables]
            if any(o >= 0 and t.shape[o] != 1 for o, t in zip(own, tables, strict=True)):
                return None
            inner = unrepeated(node.operands[0], axis, depth - 1)
            return inner and make("rope", inner, *tables, **dict(node.attrs))
    return None


def _merged(node: Node, axis: int) -> Node | None:
    """The operand of ``reshape(expand(x))`` where the reshape merges the expanded axis into the
    one before it.
    """
    wide = node.operands[0]
    if wide.op != "expand":
        return _inserted(node, axis)
    x = wide.operands[0]
    narrow = (1,) * (wide.type.rank - x.type.rank) + x.shape
    lead = product(node.shape[:axis])
    for at in range(1, wide.type.rank):
        merges = product(wide.shape[: at - 1]) == lead
        if not merges or wide.shape[at - 1] * wide.shape[at] != node.shape[axis]:
            continue
        unexpanded = (*wide.shape[:at], 1, *wide.shape[at + 1 :])
        tail = product(wide.shape[at + 1 :]) == product(node.shape[axis + 1 :])
        if tail and narrow == unexpanded and wide.shape[at] != 1:
            shape = (*node.shape[:axis], wide.shape[at - 1], *node.shape[axis + 1 :])
            return reshape(x, *shape)
    return None


def _inserted(node: Node, axis: int) -> Node | None:
    """A reshape by ones over the repetition."""
    x = node.operands[0]
    old = [a for a, size in enumerate(x.shape) if size != 1]
    new = [a for a, size in enumerate(node.shape) if size != 1]
    if [x.shape[a] for a in old] != [node.shape[a] for a in new] or axis not in new:
        return None
    own = old[new.index(axis)]
    inner = unrepeated(x, own, MAX_DEPTH // 2)
    if inner is None:
        return None
    return reshape(inner, *node.shape[:axis], inner.shape[own], *node.shape[axis + 1 :])
