"""Endless sequences over a paged cache of constant size: a sliding window beside the first tokens,
the sinks (StreamingLLM, Xiao et al., 2309.17453).

Scores of rotated queries and keys depend on the difference of their positions alone. So keys stay
in the cache as they are written, rotated by their own positions, and only how far a query is from
a sink has to change: it attends to sinks from the last place of a full cache, however far it has
come. Inside the window distances are the true ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ..errors import UnsupportedError
from ..ir.build import const, make
from ..ir.graph import Graph, input_name
from ..ir.node import Node
from .base import Pass
from .rewrite import rebuild

LEAST_WINDOW = 16
"""Passes are compared over fewer tokens than this, all of which every window holds."""

_OVER_PAGES = frozenset({"paged_attention", "scaled_paged_attention"})
_Q_SINKS = {"paged_attention": 8, "scaled_paged_attention": 10}
# What may stand between a rotation and attention: it acts on each number, or moves them about.
_BETWEEN = frozenset({"reshape", "permute", "cast", "concat", "slice", "mul", "div", "neg"})


@dataclass(frozen=True, slots=True)
class Window:
    """What a sequence keeps.

    Attributes:
        size: the latest tokens that one sees, itself included.
        sinks: first tokens that all see, however far they are.
    """

    size: int
    sinks: int


def slide_window(graph: Graph, window: Window) -> Graph:
    """Gives every paged attention a window, and the sinks beside it.

    Before::

        cos_0: f32[T, 1, 8] = cos(angle)
        sin_0: f32[T, 1, 8] = sin(angle)
        rope_0: f32[T, 4, 16] = rope(q, cos_0, sin_0, layout="half")
        paged_attention_0: f32[T, 4, 16] = paged_attention(rope_0, k, v, …, causal=True)

    After, with ``angle`` of positions, and ``angle_1`` of positions of 4099 at most::

        cos_1: f32[T, 1, 8] = cos(angle_1)
        sin_1: f32[T, 1, 8] = sin(angle_1)
        rope_1: f32[T, 4, 16] = rope(q, cos_1, sin_1, layout="half")
        paged_attention_0: f32[T, 4, 16] = paged_attention(rope_0, k, v, …, rope_1,
            causal=True, window=4096, num_sinks=4)

    An attention whose own window is not larger stays as it is: it never saw its first tokens from
    afar. Without sinks the others get the window alone.

    Raises:
        UnsupportedError: positions enter an attention in another way than by a rotation that is
            computed of each token's position; the message names it.
    """
    _check_tables(graph)
    values: dict[Node, Node] = {}
    count = 0
    for node in graph.nodes:
        values[node] = rebuild(node, values)
        if node.op in _OVER_PAGES:
            own = node.attr("window")
            if not isinstance(own, int) or own > window.size:
                values[node] = _slid(values[node], f"attention {count} of {graph.name}", window)
            count += 1
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))


def window_pass(window: Window) -> Pass:
    """``slide_window`` with this one. Over the few tokens that passes are compared on, nothing has
    left the window: the numbers are those from before.
    """
    return Pass("slide-window", partial(slide_window, window=window))


def _check_tables(graph: Graph) -> None:
    """Refuses rows that are looked up by position: a table ends where a sequence goes on."""
    free: set[Node] = set()
    placed: set[Node] = set()
    for node in graph.nodes:
        inputs = [operand for operand in node.operands if operand not in free]
        if node.op == "input":
            if input_name(node) == "positions":
                placed.add(node)
        elif not inputs:
            free.add(node)
        elif all(operand in placed for operand in inputs):
            if node.op in ("index_select", "embedding"):
                found = f"{node.operands[0].type}, of which each position takes a row"
                raise _other_positions(graph.name, found)
            placed.add(node)


def _slid(node: Node, name: str, window: Window) -> Node:
    attrs = {**dict(node.attrs), "window": window.size}
    if node.args[7] is not None:
        raise _other_positions(name, "ALiBi")
    q = node.operands[0]
    turned = _turned_at_most(q, window.sinks + window.size - 1, name)
    if turned is None:
        raise _other_positions(name, "queries without rotary embedding")
    if not window.sinks:
        return make(node.op, *node.args, **attrs)
    args = (*node.args[: _Q_SINKS[node.op]], turned)
    return make(node.op, *args, **attrs, num_sinks=window.sinks)


def _turned_at_most(node: Node, last: int, name: str) -> Node | None:
    """``node`` with what is rotated in it rotated as at place ``last`` at most; None where nothing
    is.
    """
    if node.op == "rope":
        x, *tables = node.operands
        return make("rope", x, *(_at_most(t, last, name) for t in tables), **dict(node.attrs))
    if node.op not in _BETWEEN:
        return None
    turned = {n: new for n in node.operands if (new := _turned_at_most(n, last, name)) is not None}
    return rebuild(node, turned) if turned else None


def _at_most(table: Node, last: int, name: str) -> Node:
    """A table of angles for positions of at most ``last``."""
    values: dict[Node, Node] = {}
    for node in _below(table):
        values[node] = rebuild(node, values)
        if node.op == "input":
            if input_name(node) != "positions":
                raise _other_positions(name, f"a rotation that depends on {input_name(node)}")
            values[node] = make("minimum", node, const(last, node.dtype))
    if not any(node.op == "input" for node in values):
        raise _other_positions(name, "a rotation that is the same for all tokens")
    return values[table]


def _below(root: Node) -> Iterator[Node]:
    """All that ``root`` is made of, operands first, itself last."""
    done: set[Node] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        missing = [operand for operand in node.operands if operand not in done]
        if missing:
            stack += missing
            continue
        stack.pop()
        if node not in done:
            done.add(node)
            yield node


def _other_positions(name: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"KVCacheConfig.window for {name}",
        expected="queries rotated by their positions (rotary embedding), by angles computed of "
        "each position alone",
        found=found,
        remedy="Leave the window out.",
    )
