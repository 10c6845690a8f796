"""Rotary position embedding (Su et al., 2104.09864), in both layouts, found by its arithmetic.

``half`` turns the pairs (x[i], x[i + R/2]), ``interleaved`` the pairs (x[2i], x[2i + 1]). The
op takes one angle a pair,
so cos and sin that models repeat to R entries must be proven to repeat: both parts have to be
the same node. In 16 bits, where the products and their sum round, it is ``stepwise``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.build import make, reshape
from ..ir.graph import Graph
from ..ir.node import Node
from .base import Pass
from .match import steps_round
from .push import cut, sliced
from .rewrite import Context, Rule, rewrite


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the two members of each pair lie in the last dimension."""

    name: str

    def parts(self, x: Node, *, deep: bool) -> tuple[Node, Node]:
        """First and second members of the pairs, [..., R/2] each; ``deep`` pushes the slices to
        the leaves.
        """
        dim, size = x.type.rank - 1, x.shape[-1]
        assert isinstance(size, int)
        take = sliced if deep else cut
        if self.name == "half":
            return take(x, dim, 0, size // 2), take(x, dim, size // 2, size)
        return take(x, dim, 0, size, 2), take(x, dim, 1, size, 2)

    def joined(self, node: Node) -> tuple[Node, Node] | None:
        """The two parts that ``node`` is made of, None when it is not so made."""
        if self.name == "half":
            found = node if node.op == "concat" and node.attr("dim") == node.type.rank - 1 else None
            return _pair(found)
        inner = node.operands[0] if node.op == "reshape" else None
        if inner is None or inner.op != "concat" or inner.attr("dim") != inner.type.rank - 1:
            return None
        pair, shape = _pair(inner), (*node.shape[:-1], node.shape[-1] // 2)
        if pair is None or inner.shape != (*shape, 2):
            return None
        first, second = (reshape(_below(part), *shape) for part in pair)
        return first, second


LAYOUTS = (_Layout("half"), _Layout("interleaved"))


def rotated(node: Node, context: Context) -> Node | None:
    """``add(mul(x, cos), mul(turned(x), sin)) → rope(x, cos, sin)``, turned being concat or
    stack of (-second, first).
    """
    if not _even(node) or any(operand.op != "mul" for operand in node.operands):
        return None
    for straight, turned in (node.operands, node.operands[::-1]):
        for quarter, sin in (turned.operands, turned.operands[::-1]):
            for layout in LAYOUTS:
                x, backwards = _turned(quarter, straight, layout)
                if x is None or x.type != node.type:
                    continue
                cos = straight.operands[1 if straight.operands[0] is x else 0]
                return _rope(x, cos, make("neg", sin) if backwards else sin, layout)
    return None


def rotated_by_parts(node: Node, context: Context) -> Node | None:
    """``concat(a·cos - b·sin, b·cos + a·sin) → rope(x, cos, sin)`` where a and b are the halves
    (or pairs) of x.
    """
    if len(node.operands) > 2:
        return _with_rest(node, context)
    if not node.type.rank or not _even(node):
        return None
    for layout in LAYOUTS:
        parts = layout.joined(node)
        if parts is None or parts[0].op != "sub" or parts[1].op != "add":
            continue
        found = _parts_formula(*parts)
        if found is None:
            continue
        a, b, cos, sin = found
        x = _whole(a, b, layout)
        if x is not None and x.type == node.type:
            return _call(x, cos, sin, layout)
    return None


def _with_rest(node: Node, context: Context) -> Node | None:
    """``concat(first, second, rest)``, a nested concat that canonicalise has flattened."""
    first, second, *rest = node.operands
    dim = node.type.rank - 1
    if node.attr("dim") != dim or first.type != second.type:
        return None
    rope = rotated_by_parts(make("concat", first, second, dim=dim), context)
    return rope and make("concat", rope, *rest, dim=dim)


def partial(node: Node, context: Context) -> Node | None:
    """``concat(rope(x[..., :R], c, s), x[..., R:]) → rope(x, c, s)``: the op leaves what lies
    beyond R alone.
    """
    dim = node.type.rank - 1
    if node.attr("dim") != dim or len(node.operands) != 2 or node.operands[0].op != "rope":
        return None
    rope, rest = node.operands
    x, cos, sin = rope.operands
    if 2 * cos.shape[-1] != x.shape[-1] or x.op != "slice" or rest.op != "slice":
        return None
    adjacent = x.operands == rest.operands and x.attr("stop") == rest.attr("start")
    along = all(n.attr("dim") == dim and n.attr("step") == 1 for n in (x, rest))
    if not adjacent or not along:
        return None
    whole = make("slice", *x.operands, dim=dim, start=x.attr("start"), stop=rest.attr("stop"))
    return make("rope", whole, cos, sin, **dict(rope.attrs))


def _turned(quarter: Node, straight: Node, layout: _Layout) -> tuple[Node | None, bool]:
    """The x among ``straight``'s operands whose quarter turn ``quarter`` is, and whether backwards.

    Forwards is (-second, first), backwards (second, -first).
    """
    parts = layout.joined(quarter)
    minus = [part.op == "neg" for part in parts] if parts else []
    if parts is None or sum(minus) != 1:
        return None, False
    found = tuple(p.operands[0] if p.op == "neg" else p for p in parts)
    for x in straight.operands:
        if x.type == quarter.type and layout.parts(x, deep=False) == found[::-1]:
            return x, minus[1]
    return None, False


def _rope(x: Node, cos: Node, sin: Node, layout: _Layout) -> Node | None:
    if any(t.type.rank == 0 or t.shape[-1] != x.shape[-1] for t in (cos, sin)):
        return None
    (cos, cos_again), (sin, sin_again) = (layout.parts(table, deep=True) for table in (cos, sin))
    repeat = cos is cos_again and sin is sin_again
    return _call(x, cos, sin, layout) if repeat else None


def _call(x: Node, cos: Node, sin: Node, layout: _Layout) -> Node:
    return make("rope", x, *_alike(cos, sin), layout=layout.name, stepwise=steps_round(x))


def _alike(cos: Node, sin: Node) -> tuple[Node, Node]:
    """Both tables at the rank of the larger one."""
    rank = max(cos.type.rank, sin.type.rank)
    cos, sin = (reshape(t, *(1,) * (rank - t.type.rank), *t.shape) for t in (cos, sin))
    return cos, sin


def _parts_formula(first: Node, second: Node) -> tuple[Node, Node, Node, Node] | None:
    """(a, b, cos, sin) of ``first = a·cos - b·sin`` and ``second = b·cos + a·sin``."""
    if any(term.op != "mul" for term in (*first.operands, *second.operands)):
        return None
    left, right = first.operands
    for a, cos in (left.operands, left.operands[::-1]):
        for b, sin in (right.operands, right.operands[::-1]):
            wanted = ({b, cos}, {a, sin})
            found = tuple(set(term.operands) for term in second.operands)
            if found in (wanted, wanted[::-1]) and a.type == b.type and cos.shape == sin.shape:
                return a, b, cos, sin
    return None


def _whole(a: Node, b: Node, layout: _Layout) -> Node | None:
    """The x whose parts a and b are."""
    if a.op != "slice" or b.op != "slice" or a.operands != b.operands:
        return None
    source, dim = a.operands[0], a.type.rank - 1
    if a.attr("dim") != dim or b.attr("dim") != dim:
        return None
    start, stop = a.attr("start"), b.attr("stop")
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    x = cut(source, dim, start, stop)
    return x if _even(x) and layout.parts(x, deep=False) == (a, b) else None


def _pair(node: Node | None) -> tuple[Node, Node] | None:
    if node is None or len(node.operands) != 2:
        return None
    a, b = node.operands
    return (a, b) if a.type == b.type else None


def _below(node: Node) -> Node:
    return node.operands[0] if node.op == "reshape" else node


def _even(node: Node) -> bool:
    size = node.shape[-1] if node.shape else 1
    return isinstance(size, int) and size > 0 and size % 2 == 0


ROPE_RULES: tuple[Rule, ...] = (
    Rule("rotated", ("add",), rotated),
    Rule("rotated_by_parts", ("concat", "reshape"), rotated_by_parts),
    Rule("partial", ("concat",), partial),
)


def recognize_rope(graph: Graph) -> Graph:
    """Finds rotary embeddings.

    Before::

        slice_0: f32[1, 4, S, 8] = slice(q, dim=3, start=8, stop=16)
        neg_0: f32[1, 4, S, 8] = neg(slice_0)
        slice_1: f32[1, 4, S, 8] = slice(q, dim=3, start=0, stop=8)
        concat_0: f32[1, 4, S, 16] = concat(neg_0, slice_1, dim=3)
        concat_1: f32[1, S, 16] = concat(angle, angle, dim=2)
        cos_0: f32[1, S, 16] = cos(concat_1)
        sin_0: f32[1, S, 16] = sin(concat_1)
        mul_0: f32[1, 4, S, 16] = mul(q, cos_0)
        mul_1: f32[1, 4, S, 16] = mul(concat_0, sin_0)
        add_0: f32[1, 4, S, 16] = add(mul_0, mul_1)

    After::

        cos_0: f32[1, S, 8] = cos(angle)
        sin_0: f32[1, S, 8] = sin(angle)
        rope_0: f32[1, 4, S, 16] = rope(q, cos_0, sin_0, layout='half')
    """
    return rewrite(graph, ROPE_RULES)


RECOGNIZE_ROPE = Pass("recognize_rope", recognize_rope)
