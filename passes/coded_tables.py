"""Rows picked from a table that a checkpoint holds in codes: only the picked ones are decoded."""

from __future__ import annotations

import torch

from ..formats.stored_codes import StoredCodes, codes_of
from ..formats.weights import Weight
from ..ir.build import cast, const, make, param, reshape
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from ..ir.types import TensorType

_MIDDLE = 8.0


def coded_tables(graph: Graph) -> dict[Node, tuple[str, StoredCodes]]:
    """The embeddings that can read codes: of each its weight's name and parts."""
    found: dict[Node, tuple[str, StoredCodes]] = {}
    for node in graph.nodes:
        if node.op != "embedding" or node.operands[0].op != "param":
            continue
        name = param_name(node.operands[0])
        stored = codes_of(graph.weights[name])
        if stored is not None and _by_columns(stored):
            found[node] = name, stored
    return found


def _by_columns(stored: StoredCodes) -> bool:
    whole = stored.codes.shape[1] % (stored.group or stored.codes.shape[1]) == 0
    plain = stored.order is None and stored.rounds is None
    integers = stored.codes.dtype in (torch.uint8, torch.int8)
    return whole and plain and integers and stored.rows == 1 and stored.group != 1


def decoded_rows(
    embedding: Node, name: str, stored: StoredCodes, weights: dict[str, Weight]
) -> Node:
    """``embedding(table, ids)`` from the parts of the table, which enter ``weights``.

    Before::

        embedding_0: f32[T, 64] = embedding(w, ids)

    After, for groups of 32::

        embedding_0: i8[T, 64] = embedding(w_codes, ids)
        reshape_0: f32[T, 2, 32] = reshape(cast(embedding_0, dtype=f32), shape=(T, 2, 32))
        embedding_1: f16[T, 2] = embedding(w_scale, ids)
        mul_0: f32[T, 2, 32] = mul(reshape_0, reshape(cast(embedding_1, dtype=f32), …))
        reshape_1: f32[T, 64] = reshape(mul_0, shape=(T, 64))
    """
    ids, wide = embedding.operands[1], DType.F32
    groups = stored.scale.shape[1]
    size = stored.codes.shape[1] // groups
    four = stored.codes.dtype == torch.uint8

    def picked(part: Weight, suffix: str, last: int) -> Node:
        full = f"{name}.{suffix}"
        weights[full] = part
        table = param(full, TensorType(DType.from_torch(part.dtype), tuple(part.shape)))
        rows = cast(make("embedding", table, ids), wide)
        return reshape(rows, *ids.shape, groups, last)

    # Products read two 4-bit codes a byte; a row of those is no row of a table.
    rows = picked(stored.codes, "row_codes" if four else "codes", size)
    if stored.zero is not None:
        rows = make("sub", rows, picked(stored.zero, "zero", 1))
    elif four:
        rows = make("sub", rows, const(_MIDDLE, wide))
    rows = make("mul", rows, picked(stored.scale, "scale", 1))
    return cast(reshape(rows, *embedding.shape), embedding.dtype)
