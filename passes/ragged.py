"""From one sequence to ragged tokens: the proven decoder over [1, S] rewritten over T tokens of
many sequences.

Every value with a token axis becomes token-major: the token axis first, axes of size one dropped,
the rest in order. The sources change (ids and positions become inputs), attention is handed to the
caller, all else is the same op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ..ir.build import cast, item, make, permute, reshape
from ..ir.dims import symbol
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from ..ir.schema import schema
from ..ir.types import TensorType
from .token_axes import Axis, is_position_table, mixes, token_axes

Attend: TypeAlias = Callable[[Node, Node, Node, Node], Node]
"""(attention node, q [T, H, D], k [T, G, D], v [T, G, E]) -> [T, H, E]"""


class Ragged:
    """The state of one translation: each node of the old graph and what stands for it in the new
    one.
    """

    def __init__(
        self, graph: Graph, ids: Node, token_ids: Node, positions: Node, attend: Attend
    ) -> None:
        self.ids, self.token_ids, self.positions, self.attend = ids, token_ids, positions, attend
        self.old_size, self.tokens = ids.shape[1], symbol("T")
        self.axes = token_axes(graph, ids)
        self.new: dict[Node, Node] = {}
        for node in graph.nodes:
            self.new[node] = self._translate(node)

    def kept(self, node: Node, *also: int) -> tuple[int, ...]:
        """The old axes that the new layout has behind T: those wider than one, and ``also``."""
        return self._kept(node.type, self.axes[node], also)

    def view(self, node: Node, dims: Sequence[int]) -> Node:
        """The new value laid out as [T, *dims] (token-free values: [*dims]) for old axes
        ``dims``.
        """
        sizes = tuple(node.shape[d] for d in dims)
        lead = () if self.axes[node] is None else (self.tokens,)
        return reshape(self.new[node], *lead, *sizes)

    def done(self, node: Node, value: Node) -> Node:
        """``value`` in the new layout of ``node``."""
        return reshape(value, self.tokens, *(node.shape[d] for d in self.kept(node)))

    @staticmethod
    def _kept(type_: TensorType, axis: Axis, also: Sequence[int] = ()) -> tuple[int, ...]:
        wide = (d for d, s in enumerate(type_.shape) if d != axis and (s != 1 or d in also))
        return tuple(wide)

    def _translate(self, node: Node) -> Node:
        if node is self.ids:
            return self.token_ids
        if self.axes[node] is None:
            return node
        if all(self.axes[operand] is None for operand in node.operands):
            return self._source(node)
        if node.op in _RULES:
            return _RULES[node.op](self, node)
        if schema(node.op).elementwise or node.op == "gated":
            return self.done(node, self._broadcast(node))
        raise mixes(node, "an op that has no token-major form")

    def _source(self, node: Node) -> Node:
        if node.op == "iota":
            return cast(self.positions, node.dtype)
        table, axis = node.operands[0], self.axes[node]
        assert axis is not None
        if is_position_table(node, self.axes, self.old_size):
            rows = make("index_select", table, self.positions, dim=axis)
            order = (axis, *(d for d in range(node.type.rank) if d != axis))
            return self.done(node, permute(rows, *order))
        # A value repeated for every token: what stood before the repetition, over T rows.
        lead = (1,) * (node.type.rank - table.type.rank) + table.shape
        dims = self.kept(node)
        row = reshape(table, 1, *(lead[d] for d in dims))
        return make("expand", row, shape=(self.tokens, *(node.shape[d] for d in dims)))

    def _broadcast(self, node: Node) -> Node:
        return make(
            node.op, *self.aligned(node, node.operands, self.kept(node)), **dict(node.attrs)
        )

    def aligned(self, node: Node, operands: Sequence[Node], dims: Sequence[int]) -> list[Node]:
        """Operands of a broadcasting op, laid out for its axes ``dims``."""
        found = []
        for operand in operands:
            shift = node.type.rank - operand.type.rank
            own = [d - shift for d in dims]
            sizes = tuple(operand.shape[d] if d >= 0 else 1 for d in own)
            if self.axes[operand] is not None:
                found.append(reshape(self.new[operand], self.tokens, *sizes))
            else:
                found.append(operand if operand.type.rank == 0 else reshape(operand, *sizes))
        return found


Rule: TypeAlias = Callable[[Ragged, Node], Node]


def _moved(state: Ragged, node: Node, dim: int) -> tuple[Node, int]:
    """The first operand laid out so that its old axis ``dim`` exists, and where that axis is
    now.
    """
    x = node.operands[0]
    dims = state.kept(x, dim)
    return state.view(x, dims), 1 + dims.index(dim)


def _one_dim(state: Ragged, node: Node) -> Node:
    """softmax, cumsum, slice, topk, argmax: ops that name one axis."""
    old = node.attr("dim")
    assert isinstance(old, int)
    x, dim = _moved(state, node, old)
    rest = [state.new[operand] for operand in node.operands[1:]]
    value = make(node.op, x, *rest, **{**_attrs(node), "dim": dim})
    return value if len(node.types) > 1 else state.done(node, value)


def _reduce(state: Ragged, node: Node) -> Node:
    old = node.attr("dims")
    assert isinstance(old, tuple)
    x = node.operands[0]
    dims = state.kept(x, *old)  # type: ignore[arg-type]
    new = tuple(1 + dims.index(d) for d in old)
    attrs = {**_attrs(node), "dims": new}
    return state.done(node, make(node.op, state.view(x, dims), **attrs))


def _last(state: Ragged, node: Node) -> Node:
    """linear and norms: ops along the last axis."""
    x = node.operands[0]
    dims = state.kept(x, x.type.rank - 1)
    return state.done(node, make(node.op, state.view(x, dims), *node.args[1:], **_attrs(node)))


def _reshape(state: Ragged, node: Node) -> Node:
    return state.done(node, state.new[node.operands[0]])


def _permute(state: Ragged, node: Node) -> Node:
    x, order = node.operands[0], node.attr("dims")
    assert isinstance(order, tuple)
    dims = state.kept(x)
    moved = [dims.index(d) for d in order if d in dims]
    return permute(state.new[x], 0, *(1 + i for i in moved))


def _expand(state: Ragged, node: Node) -> Node:
    dims = state.kept(node)
    (x,) = state.aligned(node, node.operands, dims)
    shape = (state.tokens, *(node.shape[d] for d in dims))
    return x if x.shape == shape else make("expand", x, shape=shape)


def _concat(state: Ragged, node: Node) -> Node:
    dim = node.attr("dim")
    assert isinstance(dim, int)
    dims = state.kept(node, dim)
    parts = [state.view(operand, dims) for operand in node.operands]
    return state.done(node, make("concat", *parts, dim=1 + dims.index(dim)))


def _pad(state: Ragged, node: Node) -> Node:
    x, pads = node.operands[0], node.attr("pads")
    assert isinstance(pads, tuple)
    dims = state.kept(x, *(d for d, pair in enumerate(pads) if pair != (0, 0)))
    new: Attr = ((0, 0), *(pads[d] for d in dims))
    return state.done(node, make("pad", state.view(x, dims), pads=new, value=node.attr("value")))


def _flip(state: Ragged, node: Node) -> Node:
    x, old = node.operands[0], node.attr("dims")
    assert isinstance(old, tuple)
    dims = state.kept(x, *old)  # type: ignore[arg-type]
    new = tuple(1 + dims.index(d) for d in old)
    return state.done(node, make("flip", state.view(x, dims), dims=new))


def _matmul(state: Ragged, node: Node) -> Node:
    a, b = node.operands
    if any(s != 1 for s in (*a.shape[:-2], *b.shape[:-2])):
        raise mixes(node, "a batched product that has no token-major form")
    rows = state.view(a, (a.type.rank - 1,))
    return state.done(node, make("matmul", rows, reshape(b, *b.shape[-2:])))


def _embedding(state: Ragged, node: Node) -> Node:
    table, ids = node.operands
    return state.done(node, make("embedding", table, state.new[ids]))


def _index_select(state: Ragged, node: Node) -> Node:
    x, index = node.operands
    dim = node.attr("dim")
    assert isinstance(dim, int)
    if state.axes[index] is not None:
        if any(s != 1 for s in x.shape[:dim]):
            raise mixes(node, "a lookup that has no token-major form")
        table = reshape(x, *x.shape[dim:])
        return state.done(node, make("index_select", table, state.new[index], dim=0))
    moved, new_dim = _moved(state, node, dim)
    return state.done(node, make("index_select", moved, index, dim=new_dim))


def _gather(state: Ragged, node: Node) -> Node:
    x, index = node.operands
    dim = node.attr("dim")
    assert isinstance(dim, int)
    dims = tuple(sorted({*state.kept(x, dim), *state.kept(index, dim)}))
    views = (state.view(x, dims), state.view(index, dims))
    return state.done(node, make("gather", *views, dim=1 + dims.index(dim)))


def _rope(state: Ragged, node: Node) -> Node:
    x, *tables = node.operands
    dims = state.kept(x, x.type.rank - 1)
    turned = state.aligned(node, tables, dims)
    return state.done(node, make("rope", state.view(x, dims), *turned, **_attrs(node)))


def _attention(state: Ragged, node: Node) -> Node:
    q, k, v = (state.view(operand, (1, 3)) for operand in node.operands[:3])
    return state.done(node, state.attend(node, q, k, v))


def _experts(state: Ragged, node: Node) -> Node:
    views = [state.view(operand, (1,)) for operand in node.operands[:3]]
    value = make(node.op, *views, *node.args[3:], **_attrs(node))
    return state.done(node, value)


def _item(state: Ragged, node: Node) -> Node:
    index = node.attr("index")
    assert isinstance(index, int)
    return state.done(node, item(state.new[node.operands[0]], index))


def _attrs(node: Node) -> dict[str, Attr]:
    return dict(node.attrs)


_RULES: dict[str, Rule] = {
    "linear": _last,
    "rms_norm": _last,
    "layer_norm": _last,
    "softmax": _one_dim,
    "cumsum": _one_dim,
    "topk": _one_dim,
    "slice": _one_dim,
    "argmax": _one_dim,
    "argmin": _one_dim,
    "sum": _reduce,
    "mean": _reduce,
    "amax": _reduce,
    "amin": _reduce,
    "prod": _reduce,
    "any": _reduce,
    "all": _reduce,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "concat": _concat,
    "pad": _pad,
    "flip": _flip,
    "matmul": _matmul,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "rope": _rope,
    "attention": _attention,
    "moe_experts": _experts,
    "item": _item,
}
