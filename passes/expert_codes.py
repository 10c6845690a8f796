"""Experts whose weights a checkpoint holds in codes read those, for backends that have an op for it
(the others would decode every expert at every call: to them the tables stay numbers).
"""

from __future__ import annotations

import torch

from ..formats.stored_codes import StoredCodes
from ..formats.stored_experts import experts_in_codes
from ..formats.weights import apply_weight
from ..ir.build import make, reshape
from ..ir.dtypes import DType
from ..ir.graph import Graph, Weight, param_name
from ..ir.node import Node
from ..ir.replace import Swap, replace_params
from .schemes import Nodes


def expert_codes(graph: Graph, compute: DType | None = None) -> Graph:
    """Exchanges tables of experts that are stacks of ``dequantize_codes(…)`` for their codes.

    Before::

        moe_experts_0: f32[T, 64] = moe_experts(x, ids, weights, gate_up, down, activation="silu")

    After, for each of the two tables::

        dequantize_0: f32[768, 64] = dequantize(gate_up_codes, gate_up_scale, group=32, width=64, …)
        reshape_0: f32[4, 192, 64] = reshape(dequantize_0, shape=(4, 192, 64))

    ``compute`` is that of each ``dequantize``. Tables that something else reads, codes whose order
    of columns is their own, or that round activations, stay as they are.
    """
    swaps: dict[str, Swap] = {}
    for node in graph.nodes:
        if node.op != "moe_experts":
            continue
        for table in node.operands[3:5]:
            stored = None
            if table.op == "param" and set(graph.users[table]) == {node}:
                stored = experts_in_codes(graph.weights[param_name(table)])
            if stored is not None and _plain(stored):
                swaps[param_name(table)] = _swap(table, stored, compute)
    return replace_params(graph, swaps) if swaps else graph


def _plain(stored: StoredCodes) -> bool:
    integers = stored.codes.dtype in (torch.uint8, torch.int8)
    return integers and stored.rows == 1 and stored.order is None and stored.rounds is None


def _swap(table: Node, stored: StoredCodes, compute: DType | None) -> Swap:
    codes, width = stored.codes, stored.codes.shape[1]
    four = codes.dtype == torch.uint8
    if four:
        codes = apply_weight("pack_codes", (codes,), group=stored.group)
    parts: dict[str, Weight] = {"codes": codes, "scale": stored.scale}
    if stored.zero is not None:
        parts["zero"] = stored.zero

    def value(nodes: Nodes) -> Node:
        rows = make(
            "dequantize",
            nodes["codes"],
            nodes["scale"],
            nodes.get("zero"),
            dtype=table.dtype,
            group=stored.group,
            width=width if four else None,
            compute=compute,
        )
        return reshape(rows, *table.shape)

    return Swap(parts, value)
