"""Attention over a KV cache, for token-major tensors of many sequences (ragged) or of equal steps.

Paged (Kwon et al., 2309.06180): a cache is [N, P, G, D], N pages of P tokens; the page ids of
sequence b stand in ``block_tables[b]``; its tokens in this step are the rows
``query_start[b] : query_start[b + 1]`` of q, the last ones of its ``seq_lens[b]`` tokens. Rows that
belong to no sequence give 0. Without ``query_start`` each sequence has one token: row b is the last
token of sequence b, and gives 0 where ``seq_lens[b]`` is 0. Slots: a cache is [B, G, S, D], row b
belongs to sequence b, each of which brings T / B tokens; a row whose ``seq_lens`` is 0 is idle: it
gives 0, and writes nothing.
A window with ``num_sinks`` (StreamingLLM, Xiao et al., 2309.17453) leaves a sequence's first keys
visible for ever: their scores are of ``q_sinks`` [T, H, D], the queries as they are where the first
keys are still near. A sequence may then hold no more than pages of its first keys and of its
window: lengths and places count what the block table holds, and the window hides what is between.
Caches are values: an op returns the new one, and kernels write it in place (the schema's aliases).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dims import Size
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType, TupleType
from .attention import (
    ATTENTION_ATTRS,
    alibi_bias,
    attend,
    head_vectors_fit,
    heads_fit,
    visibility,
    window_fits,
)

PAGED_ATTRS = (*ATTENTION_ATTRS, "num_sinks")


def _kv_write_type(cache: TensorType, new: TensorType, slot_mapping: TensorType) -> TensorType:
    if cache.rank != 4 or new.rank != 3 or cache.shape[2:] != new.shape[1:]:
        raise ill_typed("kv_write", "cache [N, P, G, D], new [T, G, D]", cache, new, slot_mapping)
    typed = cache.dtype is new.dtype and slot_mapping.dtype.is_integer
    if slot_mapping.shape != new.shape[:1] or not typed:
        raise ill_typed("kv_write", "slot_mapping [T], one element type", cache, new, slot_mapping)
    return cache


def write_rows(cache: torch.Tensor, new: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """``kv_write`` into the contiguous cache it is given, which it returns."""
    # Not rows[slots] = new: there a negative slot would overwrite the end of the cache.
    rows = cache.view(-1, *cache.shape[2:])
    if new.dtype.itemsize == 1:  # torch copies no rows of 8-bit floats by index
        rows, new = rows.view(torch.uint8), new.view(torch.uint8)
    rows.index_copy_(0, slot_mapping.long(), new)
    return cache


def _kv_write(cache: torch.Tensor, new: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    return write_rows(cache.clone(memory_format=torch.contiguous_format), new, slot_mapping)


def _paged_type(
    q: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    block_tables: TensorType,
    seq_lens: TensorType,
    query_start: TensorType | None = None,
    sinks: TensorType | None = None,
    alibi: TensorType | None = None,
    q_sinks: TensorType | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    num_sinks: int | None = None,
) -> TensorType:
    ranks = q.rank == 3 and k_cache.rank == v_cache.rank == 4
    if not ranks or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ill_typed("paged_attention", "q [T, H, D], caches [N, P, G, D]", q, k_cache, v_cache)
    tables = (block_tables, seq_lens, query_start)
    count = seq_lens.shape
    integers = all(t is None or t.dtype.is_integer for t in tables)
    if len(count) != 1 or block_tables.shape[:-1] != count or not integers:
        raise ill_typed("paged_attention", "integers [B, M], [B] and [B + 1]", *tables)
    if query_start is None:
        if q.shape[:1] != count:
            raise ill_typed("paged_attention", "a row of q for each of seq_lens [B]", q, seq_lens)
    elif query_start.shape != (count[0] + 1,):
        raise ill_typed("paged_attention", "integers [B, M], [B] and [B + 1]", *tables)
    head_vectors_fit("paged_attention", q.shape[1], sinks, alibi)
    window_fits("paged_attention", window)
    _sinks_fit(q, q_sinks, alibi, num_sinks, window, causal)
    heads_fit("paged_attention", q.with_shape((1, *q.shape)), k_cache, v_cache, 2)
    return q.with_shape((*q.shape[:2], v_cache.shape[3]))


def _sinks_fit(
    q: TensorType,
    q_sinks: TensorType | None,
    alibi: TensorType | None,
    num_sinks: int | None,
    window: int | None,
    causal: bool,
) -> None:
    """First keys that stay come with queries of their own, in causal attention with a window whose
    distances no slopes weigh; else GraphError.
    """
    if (q_sinks is None) is not (num_sinks is None):
        raise ill_typed("paged_attention", "q_sinks and num_sinks together", q_sinks)
    if q_sinks is None or num_sinks is None:
        return
    if q_sinks != q:
        raise ill_typed("paged_attention", "q_sinks like q", q, q_sinks)
    if num_sinks < 1 or window is None or not causal or alibi is not None:
        wanted = "num_sinks of 1 or more in causal attention with a window and without alibi"
        raise ill_typed("paged_attention", wanted, q_sinks, alibi)


def _paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    q_sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    num_sinks: int | None = None,
) -> torch.Tensor:
    return attend_pages(
        q,
        lambda pages: (k_cache[pages], v_cache[pages]),
        k_cache.shape[1],
        q.new_zeros(*q.shape[:2], v_cache.shape[3]),
        (block_tables, seq_lens, query_start),
        sinks,
        alibi,
        q_sinks,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        num_sinks=num_sinks,
    )


def attend_pages(
    q: torch.Tensor,
    rows: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    page: int,
    out: torch.Tensor,
    metadata: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    sinks: torch.Tensor | None,
    alibi: torch.Tensor | None,
    q_sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    num_sinks: int | None = None,
) -> torch.Tensor:
    """``paged_attention`` over keys and values that ``rows`` reads.

    Args:
        q: [T, H, D].
        rows: page ids [n] -> keys [n, P, G, D] and values [n, P, G, E].
        page: tokens of a page.
        out: zeros [T, H, E], which it fills and returns.
        metadata: block_tables, seq_lens and query_start, as the op takes them; what follows too.
    """
    block_tables, seq_lens, query_start = metadata
    lengths = seq_lens.tolist()
    starts = list(range(len(lengths) + 1)) if query_start is None else query_start.tolist()
    for b, length in enumerate(lengths):
        start, stop = starts[b], starts[b + 1]
        if start == stop or (query_start is None and not length):
            continue
        pages = block_tables[b, : -(-length // page)].long()
        k, v = (x.flatten(0, 1)[:length].transpose(0, 1) for x in rows(pages))
        query_positions = torch.arange(length - (stop - start), length, device=q.device)
        key_positions = torch.arange(length, device=q.device)
        visible = visibility(query_positions, key_positions, causal, window)
        far = None
        if q_sinks is not None and num_sinks is not None and visible is not None:
            first = key_positions < num_sinks
            visible |= first & (query_positions[:, None] >= key_positions)
            far = (q_sinks[start:stop].transpose(0, 1), first)
        attended = attend(
            q[start:stop].transpose(0, 1),
            k,
            v,
            visible,
            alibi_bias(alibi, query_positions, key_positions),
            sinks,
            scale,
            softcap,
            far,
        )
        out[start:stop] = attended.transpose(0, 1)
    return out


def _slot_type(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    seq_lens: TensorType,
    sinks: TensorType | None = None,
    alibi: TensorType | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> TupleType:
    ranks = q.rank == k.rank == v.rank == 3 and k_cache.rank == v_cache.rank == 4
    if not ranks or not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
        raise ill_typed("slot_attention", "q [T, H, D], k [T, G, D], v [T, G, E]", q, k, v)
    for new, cache in ((k, k_cache), (v, v_cache)):
        heads_and_width = (cache.shape[1], cache.shape[3])
        if heads_and_width != new.shape[1:] or cache.dtype is not new.dtype:
            raise ill_typed("slot_attention", "caches [B, G, S, D] like k and v", new, cache)
    count = seq_lens.shape
    if k_cache.shape[:3] != v_cache.shape[:3] or count != k_cache.shape[:1]:
        raise ill_typed("slot_attention", "caches of one shape, seq_lens [B]", k_cache, seq_lens)
    if not seq_lens.dtype.is_integer:
        raise ill_typed("slot_attention", "integer seq_lens", seq_lens)
    head_vectors_fit("slot_attention", q.shape[1], sinks, alibi)
    window_fits("slot_attention", window)
    heads_fit("slot_attention", q, k, v, 1)
    return (q.with_shape((*q.shape[:2], v.shape[2])), k_cache, v_cache)


def attend_slots(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``slot_attention`` that writes the caches it is given, and returns them."""
    count = q.shape[0] // seq_lens.shape[0]
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    for b, length in enumerate(seq_lens.tolist()):
        if not length:
            continue
        rows = slice(b * count, (b + 1) * count)
        k_cache[b, :, length - count : length] = k[rows].transpose(0, 1)
        v_cache[b, :, length - count : length] = v[rows].transpose(0, 1)
        query_positions = torch.arange(length - count, length, device=q.device)
        key_positions = torch.arange(length, device=q.device)
        attended = attend(
            q[rows].transpose(0, 1),
            k_cache[b, :, :length],
            v_cache[b, :, :length],
            visibility(query_positions, key_positions, causal, window),
            alibi_bias(alibi, query_positions, key_positions),
            sinks,
            scale,
            softcap,
        )
        out[rows] = attended.transpose(0, 1)
    return out, k_cache, v_cache


def _slot_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    *rest: torch.Tensor | None,
    **attrs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attend_slots(q, k, v, k_cache.clone(), v_cache.clone(), seq_lens, *rest, **attrs)


def _written_bytes(node: Node) -> Size:
    """The new rows read and written, and their slots; not the whole cache."""
    _, new, slot_mapping = node.operands
    return new.type.nbytes * 2 + slot_mapping.type.nbytes


def paged_flops(node: Node) -> Size:
    """An upper bound: every token against every token that the block table can hold."""
    q, k_cache, v_cache, block_tables = node.operands[:4]
    length = block_tables.shape[1] * k_cache.shape[1]
    return q.shape[0] * q.shape[1] * length * (q.shape[2] + v_cache.shape[3]) * 2


def _slot_flops(node: Node) -> Size:
    q, _, v, k_cache = node.operands[:4]
    return q.shape[0] * q.shape[1] * k_cache.shape[2] * (q.shape[2] + v.shape[2]) * 2


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _paged_samples(g: torch.Generator) -> list[Sample]:
    tables = torch.tensor([[3, 1, 0], [2, 0, 0]], dtype=torch.int32)
    args = (
        _x(g, 4, 4, 8),
        _x(g, 5, 4, 2, 8),
        _x(g, 5, 4, 2, 8),
        tables,
        _i32(7, 2),
        _i32(0, 3, 4),
    )
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    return [
        Sample(args, {"scale": 0.3}),
        Sample((*args, _x(g, 4), slopes), {"scale": 0.3, "window": 3, "softcap": 4.0}),
        Sample((_x(g, 2, 4, 8), *args[1:5], None, _x(g, 4)), {"scale": 0.3}),
        Sample((*args, None, None, _x(g, 4, 4, 8)), {"scale": 0.3, "window": 2, "num_sinks": 2}),
    ]


def _slot_samples(g: torch.Generator) -> list[Sample]:
    fresh = (_x(g, 2, 4, 8), _x(g, 2, 2, 8), _x(g, 2, 2, 8))
    caches = (_x(g, 2, 2, 6, 8), _x(g, 2, 2, 6, 8), _i32(5, 3))
    return [
        Sample((*fresh, *caches), {"scale": 0.3}),
        Sample((*fresh, *caches, _x(g, 4)), {"scale": 0.3, "window": 2, "softcap": 4.0}),
    ]


KV_WRITE = register(
    OpSchema(
        "kv_write",
        ("cache", "new", "slot_mapping"),
        _kv_write_type,
        _kv_write,
        aliases=((0, 0),),
        samples=lambda g: [Sample((_x(g, 3, 4, 2, 8), _x(g, 2, 2, 8), torch.tensor([5, 11])))],
        moved=_written_bytes,
    )
)
PAGED_ATTENTION = register(
    OpSchema(
        "paged_attention",
        (
            "q",
            "k_cache",
            "v_cache",
            "block_tables",
            "seq_lens",
            "query_start?",
            "sinks?",
            "alibi?",
            "q_sinks?",
        ),
        _paged_type,
        _paged_attention,
        PAGED_ATTRS,
        paged_flops,
        _paged_samples,
    )
)
SLOT_ATTENTION = register(
    OpSchema(
        "slot_attention",
        ("q", "k", "v", "k_cache", "v_cache", "seq_lens", "sinks?", "alibi?"),
        _slot_type,
        _slot_attention,
        ATTENTION_ATTRS,
        _slot_flops,
        _slot_samples,
        aliases=((1, 3), (2, 4)),
    )
)
