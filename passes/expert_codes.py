"""Experts whose weights a checkpoint holds in codes read those, for backends that have an op for it
(the others would decode every expert at every call: to them the tables stay numbers).
"""

from __future__ import annotations

import torch

from ..formats.stored_codes import StoredCodes
from ..formats.stored_experts import experts_in_codes
from ..ir.build import reshape
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from ..ir.replace import Swap, replace_params
from .keep_codes import decoded, parts_in_codes
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
    def value(parts: Nodes) -> Node:
        return reshape(decoded(stored, parts, table.dtype, compute), *table.shape)

    return Swap(parts_in_codes(stored), value)
