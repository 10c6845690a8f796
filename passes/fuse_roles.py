"""Which fused groups a matmul kernel could take in: the one before, or those after.

The mark says what the graph allows. Whether a kernel takes the group in is for it, and the tuner,
to decide; a backend that does not look at the mark loses nothing.
"""

from __future__ import annotations

from ..ir.build import make
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.ops.control import body_of
from .fuse_space import LOADS
from .rewrite import rebuild

PRODUCTS = frozenset({"linear", "matmul"})


def mark_roles(graph: Graph) -> Graph:
    """The graph with ``roles`` on the fused nodes that have any."""
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        new = rebuild(node, values)
        if node.op == "fused":
            new = make("fused", *new.args, **{**dict(new.attrs), "roles": roles_of(graph, node)})
        values[node] = new
    return graph.with_outputs(tuple(values[output] for output in graph.outputs))


def roles_of(graph: Graph, node: Node) -> tuple[str, ...] | None:
    """The roles that a fused node could play, "epilogue" before "prologue"; None for none.

    Epilogue: elementwise, one result, over the rows of one product that nothing else reads.
    Prologue: one result, that only products read, as their left operand.
    """
    if len(node.types) > 1 or node in graph.outputs:
        epilogue = len(node.types) == 1 and _is_epilogue(graph, node)
        return ("epilogue",) if epilogue else None
    found = []
    if _is_epilogue(graph, node):
        found.append("epilogue")
    if _is_prologue(graph, node):
        found.append("prologue")
    return tuple(found) or None


def _is_epilogue(graph: Graph, node: Node) -> bool:
    products = [operand for operand in node.operands if operand.op in PRODUCTS]
    if node.attr("kind") != "elementwise" or len(products) != 1:
        return False
    (product,) = products
    alone = graph.users[product] == (node,) and product not in graph.outputs
    rows = product.shape[:-1] == node.type.shape[:-1]
    return alone and rows and _reads_rows(body_of(node), node.operands.index(product))


def _reads_rows(body: Graph, index: int) -> bool:
    """Whether each row of the body's results reads no row but the same one of operand ``index``."""
    operand = body.inputs[index]
    last = operand.type.rank - 1
    return all(
        reader.op not in LOADS and (reader.op != "slice" or reader.attr("dim") == last)
        for reader in body.users[operand]
    )


def _is_prologue(graph: Graph, node: Node) -> bool:
    users = graph.users[node]
    return bool(users) and all(
        user.op in PRODUCTS and user.args[0] is node and node not in user.args[1:] for user in users
    )
