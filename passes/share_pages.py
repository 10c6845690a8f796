"""Decode steps learn which sequences begin with the same pages, for attention that reads these once
(cascade attention).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..ir.build import input_node, make
from ..ir.dtypes import DType
from ..ir.graph import Graph, input_name
from ..ir.node import Node
from ..ir.types import TensorType
from .base import Pass, Tensors
from .rewrite import rebuild

GROUPS = ("group_rows", "group_ids", "shared_pages")
"""The inputs that are added, each i32[B]."""


def share_pages(graph: Graph) -> Graph:
    """Puts ``share_pages`` between block tables and the attention of decode steps that sees all
    keys. With windows, slopes, first keys that stay, or a cache of codes each sequence reads its
    own pages, as before.

    Before::

        def decoder(…, block_tables: i32[B, M], …):
            a: f32[B, 4, 8] = paged_attention(q, k, v, block_tables, seq_lens, scale=0.3)

    After::

        def decoder(…, block_tables: i32[B, M], …, group_rows: i32[B], group_ids: i32[B],
                    shared_pages: i32[B]):
            tables: i32[B, M] = share_pages(block_tables, group_rows, group_ids, shared_pages)
            a: f32[B, 4, 8] = paged_attention(q, k, v, tables, seq_lens, scale=0.3)
    """
    readers = [node for node in graph.nodes if _may_share(node)]
    if not readers:
        return graph
    tables = readers[0].operands[3]
    given = tuple(input_node(name, TensorType(DType.I32, tables.shape[:1])) for name in GROUPS)
    told = make("share_pages", tables, *given)
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        new = rebuild(node, values)
        if _may_share(node) and node.operands[3] is tables:
            args = [*new.args[:3], told, *new.args[4:]]
            new = make(new.op, *args, **dict(new.attrs))
        values[node] = new
    outputs = tuple(values[output] for output in graph.outputs)
    return replace(graph.with_outputs(outputs), inputs=graph.inputs + given)


def _may_share(node: Node) -> bool:
    """Attention of one token a sequence that sees all keys, whatever their distance."""
    if node.op != "paged_attention" or node.args[5] is not None:
        return False
    weighed = (node.args[7], node.args[8], node.attr("window"))
    return node.operands[3].op == "input" and all(x is None for x in weighed)


def with_groups(before: Graph, after: Graph, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The inputs, and the pages that all sequences of the step share as one group."""
    if len(after.inputs) == len(before.inputs):
        return tuple(inputs)
    given = {input_name(node): tensor for node, tensor in zip(before.inputs, inputs, strict=True)}
    tables = given["block_tables"]
    count = len(tables)
    same = (tables == tables[:1]).all(0).int().cumprod(0).sum()
    rows = torch.arange(count, dtype=torch.int32)
    pages = same.int().expand(count).contiguous()
    ids = (pages > 0).int()
    added = {"group_rows": rows, "group_ids": ids, "shared_pages": pages}
    return (*inputs, *(added[name] for name in GROUPS))


SHARE_PAGES = Pass("share_pages", share_pages, with_groups)
