"""Where KV heads can become fewer: attention whose queries, keys and values are linears of one
input, and whose results meet one linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.graph import Graph, param_name
from ...ir.node import Node

_HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] to [B, H, S, D] and back
_NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True, slots=True)
class Projection:
    """Heads that are rows of a linear.

    Attributes:
        linear: of weight [N, K] and perhaps a bias [N], both params.
        start, stop: its rows that the heads are.
        name: what the weight of these rows alone is called.
        steps: the nodes from the linear's rows to attention's operand: one reshape to heads, and
            permutes, casts, rotary embeddings and norms of single heads.
    """

    linear: Node
    start: int
    stop: int
    name: str
    steps: tuple[Node, ...]

    @property
    def normed(self) -> bool:
        """Whether each head is normalised after the linear, so that none may be turned before."""
        return any(step.op in _NORMS for step in self.steps)

    @property
    def rope(self) -> Node | None:
        """The rotary embedding of the heads."""
        return next((step for step in self.steps if step.op == "rope"), None)

    @property
    def bias(self) -> Node | None:
        """The linear's bias, a param [N]."""
        return self.linear.args[2]

    @property
    def bias_name(self) -> str:
        """What the bias of these rows alone is called."""
        assert self.bias is not None
        own = self.name.removeprefix(param_name(self.linear.operands[1]))
        return f"{param_name(self.bias)}{own}"


@dataclass(frozen=True, slots=True)
class HeadSite:
    """Attention of H query heads over G KV heads of D columns of keys and E of values.

    Attributes:
        attention: the node.
        q, k, v: what its operands are made by, of one input.
        joined: the nodes from attention to the input of ``output``: a permute and a reshape.
        output: the linear that reads the heads side by side, [N, H * E].
        sizes: (H, G, D, E).
        apart: whether query heads differ in more than their weights (sinks, slopes, masks): they
            then keep their places.
    """

    attention: Node
    q: Projection
    k: Projection
    v: Projection
    joined: tuple[Node, ...]
    output: Node
    sizes: tuple[int, int, int, int]
    apart: bool

    @property
    def name(self) -> str:
        """Of the site: that of the weight of its keys."""
        return self.k.name

    @property
    def turns_keys(self) -> bool:
        """Whether keys may be turned, and queries back: nothing between them and the scores but a
        rotary embedding that both have.
        """
        if self.q.normed or self.k.normed:
            return False
        a, b = self.q.rope, self.k.rope
        if a is None or b is None:
            return a is b
        return a.operands[1:] == b.operands[1:] and a.attr("layout") == b.attr("layout")

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The columns of a key that a rotary embedding turns together."""
        rope = self.k.rope
        if rope is None:
            return ()
        half = rope.operands[1].shape[-1]
        assert isinstance(half, int)
        if rope.attr("layout") == "half":
            return tuple((i, i + half) for i in range(half))
        return tuple((2 * i, 2 * i + 1) for i in range(half))


@dataclass(frozen=True, slots=True)
class Declined:
    """Attention whose heads stay: ``reason`` says what stands in the way."""

    attention: Node
    reason: str


def head_sites(graph: Graph) -> list[HeadSite | Declined]:
    """Each attention of a graph without a cache, in its order."""
    found: list[HeadSite | Declined] = []
    for node in graph.nodes:
        if node.op == "attention":
            try:
                found.append(_site(node, graph))
            except _Decline as reason:
                found.append(Declined(node, str(reason)))
    return found


class _Decline(Exception):
    """Why a site is none."""


def _site(node: Node, graph: Graph) -> HeadSite:
    q, k, v = node.operands[:3]
    sizes = (q.shape[1], k.shape[1], k.shape[3], v.shape[3])
    whole = tuple(size for size in sizes if isinstance(size, int))
    if len(whole) != 4 or k is v or q is k:
        raise _Decline("its heads are no projections of their own")
    heads, kv_heads, width, value_width = whole
    parts = (
        _projection(q, node, graph, (heads, width), "q"),
        _projection(k, node, graph, (kv_heads, width), "k"),
        _projection(v, node, graph, (kv_heads, value_width), "v"),
    )
    if len({part.linear.operands[0] for part in parts}) > 1:
        raise _Decline("its queries, keys and values are linears of different inputs")
    if parts[2].normed or parts[2].rope is not None:
        raise _Decline("its values are normalised or rotated")
    joined, output = _output(node, graph, heads * value_width)
    apart = any(arg is not None and heads in arg.shape for arg in node.args[3:])
    return HeadSite(node, *parts, joined, output, (heads, kv_heads, width, value_width), apart)


def _projection(
    value: Node, reader: Node, graph: Graph, sizes: tuple[int, int], role: str
) -> Projection:
    above: list[Node] = []
    node = value
    while node.op not in ("linear", "slice"):
        _check_step(node, sizes, [step.op for step in above])
        _check_alone(node, reader, graph)
        above.append(node)
        reader, node = node, node.operands[0]
    _check_alone(node, reader, graph)
    linear, start = _rows(node, role)
    count = sizes[0] * sizes[1]
    shaping = [step.op for step in above if step.op in ("reshape", "permute")]
    if node.shape[-1] != count or shaping != ["permute", "reshape"]:
        raise _Decline(f"its {role} is no linear cut into heads")
    weight, bias = linear.operands[1], linear.args[2]
    for part in (weight, bias):
        if part is not None and part.op != "param":
            raise _Decline(f"the weights that make its {role} are computed")
        if part is not None and len(graph.users[part]) > 1:
            raise _Decline(f"{param_name(part)!r} is read in several places")
    whole = start == 0 and linear.shape[-1] == count
    name = param_name(weight) if whole else f"{param_name(weight)}.{role}"
    return Projection(linear, start, start + count, name, tuple(reversed(above)))


def _rows(node: Node, role: str) -> tuple[Node, int]:
    """The linear whose columns, from the first on, a linear or slice is."""
    if node.op == "linear":
        return node, 0
    linear, start = node.operands[0], node.attr("start")
    last = node.attr("dim") == node.type.rank - 1 and node.attr("step") == 1
    if linear.op != "linear" or not last or not isinstance(start, int):
        raise _Decline(f"its {role} is part of no linear")
    return linear, start


def _check_step(node: Node, sizes: tuple[int, int], above: Sequence[str]) -> None:
    """Whether a node may stand between a linear's rows and attention, with those ``above`` it."""
    flat = "reshape" in above
    axis = 2 if "permute" in above else 1
    match node.op:
        case "cast" if node.operands[0].dtype.is_float and node.dtype.is_float:
            return
        case "permute" if node.attr("dims") == _HEADS_FIRST and not flat:
            return
        case "reshape" if node.shape[-2:] == sizes and not flat:
            return
        case "rope" if not flat and all(_alike(t, axis, node) for t in node.operands[1:]):
            return
        case "rms_norm" | "layer_norm" if not flat:
            if all(part.shape == sizes[1:] for part in node.operands[1:]):
                return
    where = "all heads together" if flat else "its heads"
    raise _Decline(f"a {node.op} over {where} follows their projection")


def _alike(table: Node, axis: int, rope: Node) -> bool:
    """Whether all heads, which lie along ``axis``, have the same angles."""
    own = axis - (rope.type.rank - table.type.rank)
    return own < 0 or table.shape[own] == 1


def _check_alone(node: Node, reader: Node, graph: Graph) -> None:
    if graph.users[node] != (reader,) or node in graph.outputs:
        raise _Decline("its heads are read by others too")


def _output(attention: Node, graph: Graph, width: int) -> tuple[tuple[Node, ...], Node]:
    steps: list[Node] = []
    node = attention
    while len(users := graph.users[node]) == 1 and node not in graph.outputs:
        (reader,) = users
        if reader.op == "linear" and reader.operands[0] is node:
            break
        joins = reader.op == "reshape" and reader.shape[-1] == width
        if not joins and not (reader.op == "permute" and reader.attr("dims") == _HEADS_FIRST):
            raise _Decline(f"a {reader.op} stands between its result and a linear")
        steps.append(reader)
        node = reader
    else:
        raise _Decline("its result is read by several")
    if [step.op for step in steps] != ["permute", "reshape"]:
        raise _Decline("its result is not its heads side by side")
    weight = reader.operands[1]
    if weight.op != "param" or len(graph.users[weight]) > 1:
        raise _Decline("the weight that reads its result is no param of its own")
    return tuple(steps), reader
