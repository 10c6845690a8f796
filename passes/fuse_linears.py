"""Products of a decode step take in the norm before them and the elementwise ops behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.build import make
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.printer import nested_graphs
from ..ir.schema import schema
from .base import Pass
from .fuse_body import Body, build_body, named_bodies
from .rewrite import rebuild

_FLOATS = (DType.F16, DType.BF16, DType.F32)
MAX_EPILOGUE = 8  # ops behind a product; recognised layers stay far below


def fuse_linears(graph: Graph) -> Graph:
    """Makes one ``fused`` node of kind "linear" of every product with weights [N, K].

    Before::

        rms_norm_0: bf16[B, 8] = rms_norm(x, w, eps=1e-06)
        linear_0: bf16[B, 32] = linear(rms_norm_0, gate_up)
        slice_0: bf16[B, 16] = slice(linear_0, dim=1, start=0, step=1, stop=16)
        slice_1: bf16[B, 16] = slice(linear_0, dim=1, start=16, step=1, stop=32)
        gated_0: bf16[B, 16] = gated(slice_0, slice_1, activation="silu")
        linear_1: bf16[B, 8] = linear(gated_0, down)
        add_0: bf16[B, 8] = add(x, linear_1)

    After::

        def rms_norm_linear_gated_….(x: bf16[B, 8], weight: bf16[8], weight_1: bf16[32, 8]): …
        def linear_add_….(a: bf16[B, 8], x: bf16[B, 16], weight: bf16[8, 16]): …
        fused_0: bf16[B, 16] = fused(x, w, gate_up, body=rms_norm_linear_gated_…, kind="linear")
        fused_1: bf16[B, 8] = fused(x, fused_0, down, body=linear_add_…, kind="linear")

    The norm in front is taken in where nothing but products reads it: it is computed anew for each
    of them. Behind the product the chain goes on for as long as each value has one reader, which is
    elementwise over the same rows and columns; the first of it may read the product's two halves.

    A weight that is ``dequantize`` of params is taken in: the body reads its codes and scales::

        dequantize_0: bf16[8, 16] = dequantize(down_codes, down_scale, dtype=bf16, …)
        linear_0: bf16[B, 8] = linear(x, dequantize_0)

        def dequantize_linear_….(q: i8[8, 16], scale: f32[8, 1], x: bf16[B, 16]): …
        fused_0: bf16[B, 8] = fused(down_codes, down_scale, x, body=…, kind="linear")

    So are the rows that a product of two operands in codes rounds, with the norm before them::

        quantize_rows_0: (i8[B, 16], f32[B, 1],) = quantize_rows(x, dtype=i8)
        scaled_linear_0: bf16[B, 8] = scaled_linear(item_0, item_1, down_codes, down_scale, …)

        def quantize_rows_scaled_linear_….(x: bf16[B, 16], wq: i8[8, 16], ws: f32[8, 1]): …
        fused_0: bf16[B, 8] = fused(x, down_codes, down_scale, body=…, kind="linear")
    """
    chains = {node: _chain(graph, node) for node in graph.nodes if _is_product(node)}
    groups = {members[-1]: members for members in chains.values()}
    bodies = {last: build_body(members, [last]) for last, members in groups.items()}
    named = named_bodies((body.graph for body in bodies.values()), nested_graphs(graph))
    values: dict[Node, Node] = {}
    return graph.with_outputs(
        tuple(_value(output, bodies, named, values) for output in graph.outputs)
    )


FUSE_LINEARS = Pass("fuse_linears", fuse_linears)


def _value(
    root: Node, bodies: Mapping[Node, Body], named: Mapping[Graph, Graph], values: dict[Node, Node]
) -> Node:
    """What stands for a node: a call of its group, or itself over what stands for its operands."""
    stack = [root]
    while stack:
        node = stack[-1]
        body = bodies.get(node)
        operands = node.operands if body is None else body.operands
        missing = [operand for operand in operands if operand not in values]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if body is None:
            values[node] = rebuild(node, values)
        else:
            outer = (values[operand] for operand in operands)
            values[node] = make("fused", *outer, body=named[body.graph], kind="linear")
    return values[root]


def _is_product(node: Node) -> bool:
    """Whether a decode kernel takes a product: rows [B, K] times a weight [N, K] of one type, or
    rows that are rounded for it times codes.
    """
    if node.op not in ("linear", "scaled_linear") or node.type.rank != 2:
        return False
    x = _left(node)
    if x is None or x.type.rank != 2 or x.dtype is not node.dtype or node.dtype not in _FLOATS:
        return False
    weight, *others = _weights(node)
    static = all(isinstance(size, int) and size > 0 for size in weight.shape)
    params = weight.operands if weight.op == "dequantize" else (weight,)
    plain = all(p.op == "param" for p in (*params, *others))
    return static and plain and (node.op != "linear" or weight.dtype is node.dtype)


def _left(product: Node) -> Node | None:
    """What a product multiplies, before it is rounded to codes; None for codes from elsewhere."""
    if product.op == "linear":
        return product.operands[0]
    rounds = _rounds(product)
    return None if rounds is None else rounds.operands[0]


def _rounds(product: Node) -> Node | None:
    """The ``quantize_rows`` that gives both the codes and, unless it is static, the scale."""
    codes, scale = product.operands[:2]
    if codes.op != "item" or codes.operands[0].op != "quantize_rows":
        return None
    rounds = codes.operands[0]
    own = scale.op == "item" and scale.operands[0] is rounds
    return rounds if own or scale is rounds.args[1] else None


def _weights(product: Node) -> list[Node]:
    """The weight, and what else is a param: its scale, that of x, and the bias."""
    if product.op == "linear":
        others = product.args[1:]
    else:
        rounds = _rounds(product)
        others = (*product.args[2:], None if rounds is None else rounds.args[1])
    return [other for other in others if other is not None]


def _chain(graph: Graph, product: Node) -> list[Node]:
    """The members of a product's group, in topological order, its result last."""
    norm = _prologue(graph, product)
    if product.op == "linear":
        weight = product.operands[1]
        before = [weight] if weight.op == "dequantize" else []
    else:
        rounds = _rounds(product)
        items = (operand for operand in product.operands[:2] if operand.op == "item")
        before = [*([] if rounds is None else [rounds]), *items]
    return [*norm, *before, product, *_epilogue(graph, product)]


def _prologue(graph: Graph, product: Node) -> list[Node]:
    norm = _left(product)
    if norm is None or norm.op != "rms_norm" or norm in graph.outputs:
        return []
    weight = norm.args[1]
    plain = weight is None or weight.op == "param"
    return [norm] if plain and all(_takes_in(graph, norm, r) for r in graph.users[norm]) else []


def _takes_in(graph: Graph, norm: Node, reader: Node) -> bool:
    """Whether a reader of a norm is a product that takes it in, or rounds it for such alone."""
    if reader.op == "quantize_rows":
        items = graph.users[reader]
        found = {user for one in items for user in graph.users[one]}
        return reader.operands[0] is norm and all(
            _is_product(product) and _rounds(product) is reader for product in found
        )
    return reader.op == "linear" and reader.operands[0] is norm and _is_product(reader)


def _epilogue(graph: Graph, product: Node) -> list[Node]:
    members: list[Node] = []
    value = product
    while len(members) < MAX_EPILOGUE:
        reader = _reader(graph, value, halves=not members)
        if reader is None:
            break
        members.append(reader)
        value = reader
    return members


def _reader(graph: Graph, value: Node, halves: bool) -> Node | None:
    """The one elementwise reader of a value that an epilogue can hold, None where there is none."""
    if value in graph.outputs:
        return None
    readers = graph.users[value]
    columns = value.shape[1]
    if halves and len(readers) == 2 and all(r.op == "slice" for r in readers):
        assert isinstance(columns, int)
        if not _are_halves(readers, columns) or any(r in graph.outputs for r in readers):
            return None
        users = {user for r in readers for user in graph.users[r]}
        columns //= 2
    else:
        users = set(readers)
    if len(users) != 1:
        return None
    (reader,) = users
    known = {value, *readers} if len(readers) == 2 else {value}
    return reader if _fits(reader, known, (value.shape[0], columns)) else None


def _are_halves(slices: Sequence[Node], columns: int) -> bool:
    bounds = sorted((s.attr("start"), s.attr("stop")) for s in slices)
    flat = all(s.attr("dim") == 1 and s.attr("step") == 1 for s in slices)
    return flat and columns % 2 == 0 and bounds == [(0, columns // 2), (columns // 2, columns)]


def _fits(reader: Node, known: set[Node], shape: tuple[object, object]) -> bool:
    """Whether an op over [B, N] can be a line of an epilogue: its other operands lie in memory as
    [B, N], or are broadcast to that.
    """
    if len(reader.types) != 1 or reader.type.shape != shape:
        return False
    if not (schema(reader.op).elementwise or reader.op == "gated") or reader.dtype not in _FLOATS:
        return False
    others = [operand for operand in reader.operands if operand not in known]
    return all(_is_beside(other, shape) for other in others)


def _is_beside(other: Node, shape: tuple[object, object]) -> bool:
    if other.op == "const":
        return True
    sizes = (1,) * (2 - other.type.rank) + other.shape
    broadcast = len(sizes) == 2 and all(
        size in (1, full) for size, full in zip(sizes, shape, strict=True)
    )
    return broadcast and other.dtype in _FLOATS and other.op not in ("expand", "permute")
