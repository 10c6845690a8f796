"""The token-mixing proof again, of a decoder over ragged tokens: what passes put in after the
caches must act on each token alone too.

Rows are tokens, T of them, and R after the rows are picked that logits are wanted of. Attention
over the caches, and the writes to them, were proven when they were put in.
"""

from __future__ import annotations

from ..ir.dims import Dim, symbol, symbols_of
from ..ir.graph import Graph, input_name
from ..ir.node import Node
from .token_axes import Axes, Axis, axis_of, mixes

_ROWS: tuple[Dim, ...] = (symbol("T"), symbol("R"))
_CACHED = frozenset({"kv_write", "paged_attention", "scaled_paged_attention", "slot_attention"})
_LEAVES = frozenset({"input", "param", "const"})


def check_rows(graph: Graph) -> None:
    """Returns when every op of a ragged decoder acts on each row alone.

    Raises:
        UnsupportedError: naming the first node that mixes tokens, and with them requests.
    """
    axes: dict[Node, Axis] = {}
    for node in graph.nodes:
        axes[node] = _axis(node, axes)
        for type_ in node.types:
            for index, size in enumerate(type_.shape):
                counts = any(name in symbols_of(size) for name in ("T", "R"))
                if counts and (index != axes[node] or size not in _ROWS):
                    raise mixes(node, f"axis {index} of {type_} is not one token a row")


def is_ragged(graph: Graph) -> bool:
    """Whether a graph is a decoder over ragged tokens."""
    return "token_ids" in {input_name(node) for node in graph.inputs}


def _axis(node: Node, axes: Axes) -> Axis:
    rows = all(type_.shape[:1] in ((_ROWS[0],), (_ROWS[1],)) for type_ in node.types)
    if node.op in _LEAVES:
        return 0 if rows else None
    if node.op in _CACHED:
        return 0 if node.types[0].shape[:1] == (_ROWS[0],) else None
    if node.op == "item" and node.operands[0].op in _CACHED:
        return 0 if rows else None
    if picks_rows(node):
        return axes[node.operands[0]]
    if rows and all(axes[operand] is None for operand in node.operands):
        return 0 if node.op == "expand" else axis_of(node, axes, _ROWS[0])
    return axis_of(node, axes, _ROWS[0])


def picks_rows(node: Node) -> bool:
    """Whether a node picks the rows of a value that logits are wanted of."""
    if node.op != "embedding" and (node.op != "index_select" or node.attr("dim") != 0):
        return False
    value, index = node.operands[:2]
    return index.op == "input" and input_name(index) == "logits_indices" and value is not index
