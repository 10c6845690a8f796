"""The token-mixing proof: in a decoder every op but attention acts on each token alone.

Abstract interpretation over the captured graph, whose sequence axis is one symbolic size S: each
value either does not depend on the tokens, or has exactly one token axis, of size S, along which
every op acts elementwise. ``iota(S)`` and the first S rows of a table are sources (positions),
not mixing.
Attention must be causal, without a mask that was not recognised. Whatever else reads several
tokens at once is refused, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import UnsupportedError
from ..ir.dims import Dim, Size, product, symbols_of
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.schema import schema

# The axis of a value that runs over tokens, None when the value is the same for all tokens.
Axis = int | None
Axes = Mapping[Node, Axis]


def token_axes(graph: Graph, ids: Node) -> dict[Node, Axis]:
    """The token axis of every node of a decoder over ``ids`` i64[1, S].

    Raises:
        UnsupportedError: naming the first node that mixes tokens outside causal attention.
    """
    size = ids.shape[1]
    axes: dict[Node, Axis] = {}
    for node in graph.nodes:
        axes[node] = 1 if node is ids else axis_of(node, axes, size)
        _check_shape(node, axes[node], size)
    return axes


def is_position_table(node: Node, axes: Axes, size: Size) -> bool:
    """Whether ``node`` is ``table[:S]`` (or ``[..., :S, ...]``) of a token-free table: a lookup by
    position.
    """
    if node.op != "slice" or axes[node.operands[0]] is not None:
        return False
    return node.attr("start") == 0 and node.attr("stop") == size and node.attr("step") in (None, 1)


def mixes(node: Node, why: str) -> UnsupportedError:
    """The error for a node that is not token-wise."""
    return UnsupportedError(
        f"node {node} : {node.value_type}",
        expected="an op that acts on each token alone (only causal attention may mix tokens)",
        found=why,
        remedy="Compile it as a plain module (kv_cache=None), which recomputes every token.",
    )


def axis_of(node: Node, axes: Axes, size: Size) -> Axis:
    """The token axis of a node, given those of its operands and the number of tokens.

    Raises:
        UnsupportedError: it mixes tokens.
    """
    carried = {axes[operand] for operand in node.operands} - {None}
    if not carried:
        return _source_axis(node, axes, size)
    if node.op in _RULES:
        return _RULES[node.op](node, axes)
    if schema(node.op).elementwise:
        return _aligned(node, axes, node.operands)
    raise mixes(node, "an op whose effect on tokens is not known")


def _source_axis(node: Node, axes: Axes, size: Size) -> Axis:
    """Token-free operands: the value is token-free too, unless it is a source of positions or a
    repetition.
    """
    name = str(size)
    if node.op == "iota":
        length = node.attr("size")
        if length == size:
            return 0
    if node.op in ("expand", "slice"):
        grown = [i for i, s in enumerate(node.shape) if s == size]
        known = node.op == "expand" or is_position_table(node, axes, size)
        if len(grown) == 1 and known:
            return grown[0]
    _check_free(node, name)
    return None


def _check_free(node: Node, symbol: str) -> None:
    sizes = [value for _, value in node.attrs if isinstance(value, Dim)]
    used = any(symbol in symbols_of(size) for size in sizes)
    if used or any(symbol in type_.symbols for type_ in node.types):
        raise mixes(node, "a value that depends on the number of tokens")


def _check_shape(node: Node, axis: Axis, size: Size) -> None:
    """A value with a token axis has S there and nowhere else, so nothing pairs tokens with
    tokens.
    """
    for value_type in node.types:
        for i, s in enumerate(value_type.shape):
            if i != axis and str(size) in symbols_of(s):
                raise mixes(node, f"a second token-sized axis {i} in {value_type}")
        if axis is not None and value_type.shape[axis] != size:
            raise mixes(node, f"axis {axis} of {value_type} is not one token a row")


def _aligned(node: Node, axes: Axes, operands: tuple[Node, ...]) -> Axis:
    """Broadcasting: operands agree on the token axis counted from the right."""
    rank = max(operand.type.rank for operand in operands)
    found = {
        axis + rank - operand.type.rank
        for operand in operands
        if (axis := axes[operand]) is not None
    }
    if len(found) != 1:
        raise mixes(node, "operands whose token axes do not meet")
    return found.pop()


def _keep(node: Node, axes: Axes, *forbidden: int) -> Axis:
    """The first operand's axis, provided it is none of the axes that the op works along."""
    axis = axes[node.operands[0]]
    others = [o for o in node.operands[1:] if axes[o] is not None]
    if others or axis is None or axis in forbidden:
        raise mixes(node, f"works along the token axis {axis}")
    return axis


def _last(node: Node, axes: Axes) -> Axis:
    return _keep(node, axes, node.operands[0].type.rank - 1)


def _dim(node: Node, axes: Axes) -> Axis:
    return _keep(node, axes, int(node.attr("dim")))  # type: ignore[arg-type]


def _reduce(node: Node, axes: Axes) -> Axis:
    named = node.attr("dims")
    dims = named if isinstance(named, tuple) else (node.attr("dim"),)
    reduced = tuple(d for d in dims if isinstance(d, int))
    axis = _keep(node, axes, *reduced)
    if node.attr("keepdim") or axis is None:
        return axis
    return axis - sum(1 for d in reduced if d < axis)


def _reshape(node: Node, axes: Axes) -> Axis:
    x = node.operands[0]
    axis = axes[x]
    assert axis is not None
    before = product(x.shape[:axis])
    for candidate, s in enumerate(node.shape):
        if s == x.shape[axis] and product(node.shape[:candidate]) == before:
            return candidate
    raise mixes(node, f"reshapes tokens together: {x.type} to {node.type}")


def _permute(node: Node, axes: Axes) -> Axis:
    dims = node.attr("dims")
    return dims.index(axes[node.operands[0]])  # type: ignore[union-attr, arg-type]


def _expand(node: Node, axes: Axes) -> Axis:
    axis = axes[node.operands[0]]
    assert axis is not None
    return axis + node.type.rank - node.operands[0].type.rank


def _concat(node: Node, axes: Axes) -> Axis:
    found = {axes[operand] for operand in node.operands}
    if len(found) != 1 or node.attr("dim") in found:
        raise mixes(node, "joins tokens with something else")
    return found.pop()


def _pad(node: Node, axes: Axes) -> Axis:
    pads = node.attr("pads")
    assert isinstance(pads, tuple)
    return _keep(node, axes, *(d for d, pair in enumerate(pads) if pair != (0, 0)))


def _flip(node: Node, axes: Axes) -> Axis:
    return _keep(node, axes, *node.attr("dims"))  # type: ignore[misc]


def _matmul(node: Node, axes: Axes) -> Axis:
    a, b = node.operands
    axis = axes[a]
    if axes[b] is not None or axis is None or axis != a.type.rank - 2:
        raise mixes(node, "a product over tokens")
    return node.type.rank - 2


def _index_select(node: Node, axes: Axes) -> Axis:
    x, index = node.operands
    dim = int(node.attr("dim"))  # type: ignore[arg-type]
    if axes[x] is None and axes[index] is not None:
        return dim + axes[index]  # type: ignore[operator]
    axis = _keep(node, axes, dim)
    return axis if axis is None or axis < dim else axis + index.type.rank - 1


def _embedding(node: Node, axes: Axes) -> Axis:
    table, ids = node.operands
    if axes[table] is not None:
        raise mixes(node, "a table made of tokens")
    return axes[ids]


def _gather(node: Node, axes: Axes) -> Axis:
    x, index = node.operands
    if axes[x] != axes[index] or axes[x] == node.attr("dim"):
        raise mixes(node, "gathers across tokens")
    return axes[x]


def _rope(node: Node, axes: Axes) -> Axis:
    x = node.operands[0]
    axis = _aligned(node, axes, node.operands)
    if axes[x] is None or axis == x.type.rank - 1:
        raise mixes(node, "rotates along the token axis")
    return axis


def _attention(node: Node, axes: Axes) -> Axis:
    q, k, v, mask, sinks, alibi = node.args
    if mask is not None:
        raise mixes(node, f"a mask that is neither causal nor a window: {mask}")
    if not node.attr("causal"):
        raise mixes(node, "attention that sees later tokens")
    if {axes[x] for x in (q, k, v) if x is not None} != {2} or q is None or q.shape[0] != 1:
        raise mixes(node, "attention over something else than tokens")
    if any(x is not None and axes[x] is not None for x in (sinks, alibi)):
        raise mixes(node, "sinks or slopes that depend on tokens")
    return 2


def _experts(node: Node, axes: Axes) -> Axis:
    if any(axes[x] != 0 for x in node.operands[:3]):
        raise mixes(node, "routes something else than tokens")
    return 0


def _scaled(node: Node, axes: Axes) -> Axis:
    xq, xs, *weights = node.args
    assert xq is not None and xs is not None
    axis = axes[xq]
    shared = axes[xs] is None and xs.type.numel == 1  # a scale known before any token
    free = all(w is None or axes[w] is None for w in weights)
    if axis is None or axis == xq.type.rank - 1 or not free or not (shared or axes[xs] == axis):
        raise mixes(node, "a product over tokens, or scales of other tokens")
    return axis


_RULES: dict[str, Callable[[Node, Axes], Axis]] = {
    "linear": _last,
    "quantize_rows": _last,
    "scaled_linear": _scaled,
    "rms_norm": _last,
    "layer_norm": _last,
    "softmax": _dim,
    "cumsum": _dim,
    "topk": _dim,
    "slice": _dim,
    "sum": _reduce,
    "mean": _reduce,
    "amax": _reduce,
    "amin": _reduce,
    "prod": _reduce,
    "any": _reduce,
    "all": _reduce,
    "argmax": _reduce,
    "argmin": _reduce,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "concat": _concat,
    "pad": _pad,
    "flip": _flip,
    "matmul": _matmul,
    "index_select": _index_select,
    "embedding": _embedding,
    "gather": _gather,
    "rope": _rope,
    "attention": _attention,
    "moe_experts": _experts,
    "item": lambda node, axes: axes[node.operands[0]],
    "gated": lambda node, axes: _aligned(node, axes, node.operands),
}
