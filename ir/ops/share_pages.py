"""Which sequences of a step begin with the same pages: a promise about block tables.

Cascade attention, as of a prefix that many sequences have in common: who attends through the tables
may read the pages that a group shares once, for all its queries. The op changes no value where the
promise holds. Its reference makes it hold: the first sequence of a group gives its pages to the
others, so that a graph with a wrong group computes something else, and is found out.

Groups are three arrays of the step's fixed size, so that a captured graph takes any: the sequences
ordered such that members of a group stand together (``group_rows``), the group of each place in
that order, rising from 1, 0 for none (``group_ids``), and of each sequence the pages that it
shares, 0 for none (``shared_pages``); a group's members share equally many. Whole pages: what of a
prefix lies in a page that goes on otherwise is each sequence's own.
"""

from __future__ import annotations

import torch

from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType


def _type(
    block_tables: TensorType,
    group_rows: TensorType,
    group_ids: TensorType,
    shared_pages: TensorType,
) -> TensorType:
    every = (block_tables, group_rows, group_ids, shared_pages)
    rows = block_tables.shape[:1]
    fits = block_tables.rank == 2 and all(t.shape == rows for t in every[1:])
    if not fits or not all(t.dtype.is_integer for t in every):
        raise ill_typed("share_pages", "integers [B, M] and three times [B]", *every)
    return block_tables


def _share_pages(
    block_tables: torch.Tensor,
    group_rows: torch.Tensor,
    group_ids: torch.Tensor,
    shared_pages: torch.Tensor,
) -> torch.Tensor:
    tables = block_tables.clone()
    for group in group_ids.unique().tolist():
        if group > 0:
            rows = group_rows[group_ids == group].long()
            count = int(shared_pages[rows[0]])
            tables[rows, :count] = block_tables[rows[0], :count]  # no alias of what is written
    return tables


def _samples(generator: torch.Generator) -> list[Sample]:
    tables = torch.tensor([[3, 1, 0], [5, 0, 0], [3, 1, 4]], dtype=torch.int32)
    rows = torch.tensor([0, 2, 1], dtype=torch.int32)
    ids = torch.tensor([1, 1, 0], dtype=torch.int32)
    pages = torch.tensor([2, 0, 2], dtype=torch.int32)
    alone = Sample((tables[:1], rows[:1], ids[:1], pages[:1]))
    return [Sample((tables, rows, ids, pages)), alone]


SHARE_PAGES = register(
    OpSchema(
        "share_pages",
        ("block_tables", "group_rows", "group_ids", "shared_pages"),
        _type,
        _share_pages,
        samples=_samples,
    )
)
