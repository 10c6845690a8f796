"""How a graph with a cache is compared with the one it came from: its sequence as one prefill,
into shuffled pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.graph import Graph, input_name
from .base import Tensors

PAGE_SIZE = 4


def adapt_to_pages(
    before: Graph, after: Graph, inputs: Tensors, page_size: int = PAGE_SIZE
) -> tuple[torch.Tensor, ...]:
    """Inputs of the paged graph for ids [1, S]: one prefill of S tokens whose pages lie in
    descending order.
    """
    ids = inputs[0][0]
    count = len(ids)
    pages = -(-count // page_size)
    table = torch.arange(pages, 0, -1, dtype=torch.int32)
    positions = torch.arange(count)
    slots = table.long()[positions // page_size] * page_size + positions % page_size
    return _in_order(
        after,
        {
            "token_ids": ids,
            "positions": positions,
            "query_start": torch.tensor([0, count], dtype=torch.int32),
            "seq_lens": torch.tensor([count], dtype=torch.int32),
            "slot_mapping": slots,
            "block_tables": table[None],
            "logits_indices": positions,
        },
        {"N": pages + 1, "P": page_size},
    )


def adapt_to_slots(before: Graph, after: Graph, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """Inputs of the slot graph for ids [1, S]: one prefill of S tokens into one slot."""
    ids = inputs[0][0]
    positions = torch.arange(len(ids))
    return _in_order(
        after,
        {
            "token_ids": ids,
            "positions": positions,
            "seq_lens": torch.tensor([len(ids)], dtype=torch.int32),
            "logits_indices": positions,
        },
        {"B": 1, "L": len(ids) + 3},
    )


def same_logits(after: Graph, inputs: Tensors, outputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The logits as the captured graph gives them: [1, S, V]."""
    return (outputs[0][None],)


def _in_order(
    graph: Graph, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """The graph's inputs in order; caches are filled with NaN, so that reading past a sequence
    shows. Of codes that have none, the scales do.
    """
    found = []
    for node in graph.inputs:
        name = input_name(node)
        if name in given:
            found.append(given[name])
        else:
            shape = [size if isinstance(size, int) else sizes[str(size)] for size in node.shape]
            filling = torch.nan if node.dtype.is_float else 1
            found.append(torch.full(shape, filling).to(node.dtype.torch))
    return tuple(found)
