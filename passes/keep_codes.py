"""Linears whose weights a checkpoint holds in codes keep them: parts in place of each weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..formats.stored_codes import StoredCodes, codes_of
from ..formats.weights import Apply, Weight, apply_weight
from ..ir.build import cast, item, make, param
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from ..ir.replace import Swap, replace_params
from ..ir.types import TensorType
from .base import Pass
from .coded_tables import coded_tables, decoded_rows
from .quantize_check import rounded_rows
from .rewrite import rebuild
from .schemes import Nodes, Parts
from .token_rows import check_rows, is_ragged


def kept_linears(graph: Graph) -> dict[str, tuple[StoredCodes, list[Node]]]:
    """By name of weight: its codes, and the linears that read it."""
    found: dict[str, tuple[StoredCodes, list[Node]]] = {}
    for node in graph.nodes:
        if node.op != "linear" or node.operands[1].op != "param":
            continue
        name = param_name(node.operands[1])
        stored = codes_of(graph.weights[name])
        if stored is not None and _has_op(stored):
            found.setdefault(name, (stored, []))[1].append(node)
    return found


def expanded_weights(graph: Graph) -> list[str]:
    """The weights that a checkpoint holds in codes and that the graph reads as numbers."""
    names = (param_name(node) for node in graph.params)
    return [name for name in names if _expands(graph.weights[name])]


def keep_codes(graph: Graph, compute: DType | None = None) -> Graph:
    """Exchanges weights that are ``dequantize_codes(…)`` for codes, scales and zero points.

    Before, with ``w = dequantize_codes(codes, scale, …)``::

        linear_0: f32[T, 96] = linear(x, w)

    After::

        dequantize_0: f32[96, 64] = dequantize(w_codes, w_scale, dtype=f32, group=32, width=64, …)
        linear_0: f32[T, 96] = linear(x, dequantize_0)

    Where the checkpoint rounds activations too, the product is ``scaled_linear``; where its codes
    lie in an order of columns of their own, x is put in that order. Embeddings decode the rows that
    they pick (coded_tables.py). Weights that something else reads, or whose grid no op has, stay as
    they are. ``compute`` is that of each ``dequantize``.

    Raises:
        UnsupportedError: ops that mix tokens of a ragged graph.
    """
    swaps: dict[str, Swap] = {}
    parts_of: dict[Node, tuple[str, StoredCodes, Nodes]] = {}
    for name, (stored, nodes) in kept_linears(graph).items():
        value = _value(name, stored, nodes[0], parts_of, compute)
        swaps[name] = Swap(parts_in_codes(stored), value, frozenset(nodes))
    if not swaps and not coded_tables(graph):
        return graph
    result = replace_params(graph, swaps)
    read = coded_tables(result)
    values: dict[Node, Node] = {}
    more: dict[str, Weight] = {}
    for node in result.nodes:
        values[node] = rebuild(node, values)
        if node.op == "linear" and node.operands[1] in parts_of:
            values[node] = _product(values[node], *parts_of[node.operands[1]], more)
        elif node in read:
            values[node] = decoded_rows(values[node], *read[node], more)
    outputs = tuple(values[output] for output in result.outputs)
    result = result.with_weights(more).with_outputs(outputs)
    if is_ragged(result):
        check_rows(result)
    return result


def _has_op(stored: StoredCodes) -> bool:
    """Whether the graph's ops take this grid."""
    if stored.codes.dtype == torch.uint8:
        return stored.rows == 1 and stored.group % 2 == 0 and stored.rounds is None
    rounds = stored.rounds in (None, stored.codes.dtype) and stored.rounds_group in (
        0,
        stored.group,
    )
    if stored.zero is not None and stored.rounds is not None:
        return False  # no product of codes takes zero points
    return stored.group != 1 and rounds


def parts_in_codes(stored: StoredCodes) -> Parts:
    """What `decoded` reads, by name: 4-bit codes two a byte."""
    codes = stored.codes
    if codes.dtype == torch.uint8:
        codes = apply_weight("pack_codes", (codes,), group=stored.group)
    parts = {"codes": codes, "scale": stored.scale}
    return parts if stored.zero is None else {**parts, "zero": stored.zero}


def decoded(stored: StoredCodes, parts: Nodes, dtype: DType, compute: DType | None) -> Node:
    """The weight's numbers [N, K] from its parts."""
    return make(
        "dequantize",
        parts["codes"],
        parts["scale"],
        parts.get("zero"),
        dtype=dtype,
        rows=stored.rows,
        group=stored.group,
        width=stored.codes.shape[1] if stored.codes.dtype == torch.uint8 else None,
        compute=compute if stored.codes.dtype in (torch.uint8, torch.int8) else None,
    )


def _value(
    name: str,
    stored: StoredCodes,
    node: Node,
    parts_of: dict[Node, tuple[str, StoredCodes, Nodes]],
    compute: DType | None,
) -> Callable[[Nodes], Node]:
    def value(parts: Nodes) -> Node:
        made = decoded(stored, parts, node.operands[1].dtype, compute)
        parts_of[made] = (name, stored, parts)
        return made

    return value


def _entered(name: str, weight: Weight, more: dict[str, Weight]) -> Node:
    more[name] = weight
    return param(name, TensorType(DType.from_torch(weight.dtype), tuple(weight.shape)))


def _product(
    linear: Node, name: str, stored: StoredCodes, parts: Nodes, more: dict[str, Weight]
) -> Node:
    x, weight, bias = linear.args
    assert x is not None
    if stored.order is not None:
        order = _entered(f"{name}.order", stored.order, more)
        x = make("index_select", x, order, dim=x.type.rank - 1)
    if stored.rounds is None:
        return make("linear", x, weight, bias) if stored.order is not None else linear
    static = None
    if stored.static is not None:
        static = _entered(f"{name}.input_scale", stored.static, more)
    dtype = DType.from_torch(stored.rounds)
    rows = make("quantize_rows", x, static, dtype=dtype, group=stored.rounds_group)
    return make(
        "scaled_linear",
        item(rows, 0),
        item(rows, 1) if static is None else static,
        parts["codes"],
        parts["scale"],
        bias,
        dtype=linear.dtype,
        rows=stored.rows,
        group=stored.group,
    )


def _expands(weight: object) -> bool:
    if not isinstance(weight, Apply):
        return False
    return weight.op == "dequantize_codes" or any(map(_expands, weight.args))


def expected_graph(before: Graph, after: Graph) -> Graph:
    """``before`` with x rounded where the checkpoint says so, by elementary ops."""
    kept = kept_linears(before).values()
    rounding = {node: stored for stored, nodes in kept for node in nodes}
    values: dict[Node, Node] = {}
    for node in before.nodes:
        values[node] = rebuild(node, values)
        stored = rounding.get(node)
        if stored is None or stored.rounds is None:
            continue
        x, weight, bias = values[node].args
        assert x is not None
        static = None if stored.static is None else float(stored.static.load())
        codes = DType.from_torch(stored.rounds)
        rows = rounded_rows(x, codes, stored.rounds_group, static)
        wide = [None if a is None else cast(a, rows.dtype) for a in (weight, bias)]
        values[node] = cast(make("linear", rows, *wide), node.dtype)
    return before.with_outputs(tuple(values[output] for output in before.outputs))


def keep_codes_pass(compute: DType | None = None) -> Pass:
    """``keep_codes``, whose products may round x to codes of the type ``compute``."""
    run = keep_codes if compute is None else partial(keep_codes, compute=compute)
    return Pass("keep_codes", run, expected=expected_graph)


KEEP_CODES = keep_codes_pass()
