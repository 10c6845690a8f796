"""Decode attention over shared pages for tests: nodes, buffers in which all that must not be read
is poisoned, and what they give in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from paged_forms import OP, OUTSIDE, Shape, decode_call
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType


@dataclass(frozen=True)
class Group:
    """Sequences that share ``pages``, each with so many tokens behind them. One that shares no
    page is no group, and its sequences stand alone.
    """

    pages: int
    tails: list[int]


def cascade_call(shape: Shape, sizes: Mapping[str, Size] | None = None, **attrs) -> Node:
    """The call of ``decode_call`` over tables that ``share_pages`` tells of."""
    plain = decode_call(shape, sizes, **attrs)
    tables = plain.operands[3]
    groups = [
        input_node(name, TensorType(DType.I32, tables.shape[:1]))
        for name in ("group_rows", "group_ids", "shared_pages")
    ]
    args = list(plain.args)
    args[3] = make("share_pages", tables, *groups)
    return make(plain.op, *args, **dict(plain.attrs))


def cascade_operands_of(
    shape: Shape, groups: Sequence[Group], seed: int
) -> tuple[list[torch.Tensor | None], dict[str, int]]:
    """Buffers of the kernel's operands, and the value of each symbol; rows are shuffled."""
    random = torch.Generator().manual_seed(seed)
    P, G, H = shape.page, shape.kv_heads, shape.heads
    members = [(g, group.pages, tail) for g, group in enumerate(groups) for tail in group.tails]
    B = len(members)
    rows = torch.randperm(B, generator=random).tolist()
    own = [-(-tail // P) for _, _, tail in members]
    M = max(pages + n for (_, pages, _), n in zip(members, own, strict=True)) + 1
    N = sum(group.pages for group in groups) + sum(own) + 2
    free = iter(torch.randperm(N, generator=random).tolist())
    caches = [torch.full((N, P, G, w), torch.nan) for w in (shape.head_dim, shape.value_dim)]

    def filled(count: int, tokens: int) -> list[int]:
        ids = [next(free) for _ in range(count)]
        for cache in caches:
            some = torch.full((count * P, *cache.shape[2:]), torch.nan)
            some[:tokens] = torch.randn(tokens, *cache.shape[2:], generator=random)
            cache[ids] = some.unflatten(0, (count, P))
        return ids

    tables = torch.full((B, M), OUTSIDE, dtype=torch.int32)
    lens = torch.zeros(B, dtype=torch.int32)
    arrays = torch.zeros(3, B, dtype=torch.int32)  # group_rows, group_ids, shared_pages
    known: dict[int, tuple[int, list[int]]] = {}
    order = sorted(range(B), key=lambda i: members[i][1] == 0)  # those of no group come last
    for place, i in enumerate(order):
        (g, pages, tail), row = members[i], rows[i]
        arrays[0, place] = row
        if pages:
            if g not in known:
                known[g] = len(known) + 1, filled(pages, pages * P)
            arrays[1, place], arrays[2, row] = known[g][0], pages
            tables[row, :pages] = torch.tensor(known[g][1])
        tables[row, pages : pages + own[i]] = torch.tensor(filled(own[i], tail))
        lens[row] = pages * P + tail
    wide = (B, shape.head_dim, H + 3) if shape.strided else (B, H, shape.head_dim)
    dtype = shape.dtype.torch
    operands = [
        torch.randn(wide, generator=random).to(dtype),
        *(cache.to(dtype) for cache in caches),
        tables,
        lens,
        torch.randn(H, generator=random).to(dtype) if shape.sinks else None,
        *arrays,
    ]
    return operands, {"B": B, "M": M, "N": N, "P": P}


def cascade_truth(node: Node, operands: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """What the references of both ops give in double precision."""
    q, k, v, tables, lens, sinks, *groups = operands
    wide = [t if t is None else t.double() for t in (q, k, v, sinks)]
    if node.operands[0].op != "input":
        wide[0] = wide[0][:, :, 2 : node.shape[1] + 2].transpose(1, 2)
    shared = schema("share_pages").reference(tables, *groups)
    found = OP.reference(*wide[:3], shared, lens, None, wide[3], **dict(node.attrs))
    assert isinstance(found, torch.Tensor)
    return found
