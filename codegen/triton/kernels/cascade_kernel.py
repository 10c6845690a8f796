"""The device side of cascade attention: what cascade.py puts into a kernel's text.

A tile's rows are (sequence, head) pairs of one KV head: the queries of sequences that share their
first pages are stacked, so that these are read once for all of them and meet them in products that
tensor cores take. What is behind the shared pages each sequence reads by itself, as in
paged_decode_kernel.py; the parts of both are joined by their maxima and sums (Flash-Decoding).
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .paged_attention_kernel import _meet
from .paged_decode_kernel import _split


@triton.jit
def _shares(keys, splits, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    """How so many shared keys are cut: their tiles, and the tiles of a split."""
    tiles = (keys + BLOCK_N - 1) // BLOCK_N
    return tiles, tl.maximum((tiles + splits - 1) // splits, LEAST)


@triton.jit
def _parts(
    length,
    pages,
    table_width,
    page_size,
    shared_splits,
    own_splits,
    SHARED_N: tl.constexpr,
    SHARED_LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A sequence's keys in two stretches, shared and own: where the own ones begin and end, their
    tiles and the tiles of a split, and how many parts of each stretch there are.
    """
    high = tl.minimum(length, table_width * page_size)
    low = tl.maximum(tl.minimum(pages, table_width), 0) * page_size
    shared_tiles, shared_share = _shares(low, shared_splits, SHARED_N, SHARED_LEAST)
    first = low // BLOCK_N
    tiles = tl.maximum((high + BLOCK_N - 1) // BLOCK_N - first, 0)
    share = tl.maximum((tiles + own_splits - 1) // own_splits, LEAST)
    shared = (shared_tiles + shared_share - 1) // shared_share
    own = tl.maximum((tiles + share - 1) // share, 1)  # a part without keys counts, and weighs 0
    return low, high, first, tiles, share, shared, own


@triton.jit
def _shared(
    q,
    k_cache,
    v_cache,
    block_tables,
    group_rows,
    group_ids,
    shared_pages,
    partial_acc,
    partial_max,
    partial_sum,
    q_offset,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    num_seqs,
    num_pages,
    table_width,
    page_size,
    shared_splits,
    own_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # q: [B, H, D] strided; caches: [N, P, G, D], [N, P, G, E]
    # partial_acc: f32 [B, H, shared_splits + own_splits, E]; the others the same without E
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    MEMBERS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    index = tl.arange(0, BLOCK_M)
    place = tl.program_id(2) * MEMBERS + index // GROUP
    there = (index < MEMBERS * GROUP) & (place < num_seqs)
    ids = tl.load(group_ids + place, mask=there, other=0)
    member = there & (ids > 0)
    row = tl.load(group_rows + place, mask=member, other=0)
    row = tl.maximum(tl.minimum(row, num_seqs - 1), 0)
    pages = tl.load(shared_pages + row, mask=member, other=0)
    keys = tl.maximum(tl.minimum(pages, table_width), 0) * page_size
    last = tl.max(ids, 0)
    # Members of a group stand together, so that a tile has few groups, mostly one.
    first = tl.min(tl.where(member, ids, last), 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if last > 0:
        head = kv_head * GROUP + index % GROUP
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        q_mask = member[:, None]
        if HEAD_DIM != BLOCK_D:
            q_mask = q_mask & (d < HEAD_DIM)[None, :]
        q_rows = q + q_offset + row.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
        query = tl.load(q_rows[:, None] + (d * q_stride_d)[None, :], mask=q_mask, other=0.0)
        k_rows = k_cache + kv_head * HEAD_DIM
        v_rows = v_cache + kv_head * VALUE_DIM
        for group in range(first, last + 1):
            inside = member & (ids == group)
            leader = tl.max(tl.where(inside, row, 0), 0)
            high = tl.max(tl.where(inside, keys, 0), 0)
            tiles, share = _shares(high, shared_splits, BLOCK_N, LEAST)
            begin = tl.minimum(split * share, tiles)
            end = tl.minimum((split + 1) * share, tiles)
            if begin < end:
                table = block_tables + leader.to(tl.int64) * table_width
                row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
                row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
                acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)
                full = tl.maximum(tl.minimum(high // BLOCK_N, end), begin)
                for stretch in tl.static_range(2):
                    since = begin if stretch == 0 else full
                    until = full if stretch == 0 else end
                    for tile in range(since, until):
                        acc, row_max, row_sum = _meet(
                            query, None, index, acc, row_max, row_sum, None, k_rows, v_rows, table,
                            tile, 0, high, num_pages, page_size, KV_HEADS, HEAD_DIM, VALUE_DIM,
                            SCALE, SOFTCAP, False, None, PAGE, FACTOR, BLOCK_N, stretch == 1, 0,
                        )  # fmt: skip
                part = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * (shared_splits + own_splits)
                part += split
                tl.store(partial_max + part, row_max * FACTOR, mask=inside)
                tl.store(partial_sum + part, row_sum, mask=inside)
                out_mask = inside[:, None]
                if VALUE_DIM != BLOCK_E:
                    out_mask = out_mask & (e < VALUE_DIM)[None, :]
                cells = partial_acc + (part * VALUE_DIM)[:, None] + e[None, :]
                tl.store(cells, acc, mask=out_mask)


@triton.jit
def _own(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    sinks,
    shared_pages,
    out,
    partial_acc,
    partial_max,
    partial_sum,
    q_offset,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    num_pages,
    table_width,
    page_size,
    shared_splits,
    own_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARED_N: tl.constexpr,
    SHARED_LEAST: tl.constexpr,
    LEAST: tl.constexpr,
    BY_PAGE: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # As `_decode` of paged_decode_kernel.py, from where the shared pages of a sequence end.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) // HEAD_CHUNKS
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + seq).to(tl.int32)
    pages = tl.load(shared_pages + seq)
    low, high, first, tiles, share, shared, own = _parts(
        length, pages, table_width, page_size, shared_splits, own_splits,
        SHARED_N, SHARED_LEAST, BLOCK_N, LEAST,
    )  # fmt: skip
    begin = first + tl.minimum(split * share, tiles)
    end = first + tl.minimum((split + 1) * share, tiles)
    # The first split writes without keys, too.
    if (begin < end) | (split == 0):
        _split(
            q + q_offset + seq * q_stride_t,
            k_cache + kv_head * HEAD_DIM,
            v_cache + kv_head * VALUE_DIM,
            block_tables + seq * table_width,
            sinks,
            None,
            None,
            out,
            partial_acc,
            partial_max,
            partial_sum,
            q_stride_h,
            q_stride_d,
            num_pages,
            page_size,
            length,
            low,
            high,
            begin,
            end,
            split == 0,
            shared + own,
            seq * (KV_HEADS * GROUP),
            shared_splits + split,
            shared_splits + own_splits,
            KV_HEADS,
            GROUP,
            HEAD_CHUNKS,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_D,
            BLOCK_E,
            SCALE,
            SOFTCAP,
            0,
            BLOCK_M,
            BLOCK_N,
            BY_PAGE,
            PREFETCH,
            EVICT,
            PDL,
        )
    elif PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _join(
    partial_acc,
    partial_max,
    partial_sum,
    seq_lens,
    shared_pages,
    out,
    table_width,
    page_size,
    shared_splits,
    own_splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SHARED_N: tl.constexpr,
    SHARED_LEAST: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # One row of out a program, BLOCK_S of its parts at a time; one part wrote the row itself.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    seq = tl.program_id(1).to(tl.int64)
    row = seq * HEADS + tl.program_id(0)
    length = tl.load(seq_lens + seq).to(tl.int32)
    pages = tl.load(shared_pages + seq)
    _, _, _, _, _, shared, own = _parts(
        length, pages, table_width, page_size, shared_splits, own_splits,
        SHARED_N, SHARED_LEAST, BLOCK_N, LEAST,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    if shared + own > 1:
        e = tl.arange(0, BLOCK_E)
        top = float("-inf")
        total = 0.0
        acc = tl.full([BLOCK_E], 0.0, tl.float32)
        for first in range(0, shared + own, BLOCK_S):
            index = first + tl.arange(0, BLOCK_S)
            known = index < shared + own
            # The own parts stand behind all that shared ones have room for.
            split = tl.where(index < shared, index, index - shared + shared_splits)
            part = row * (shared_splits + own_splits) + split
            tops = tl.load(partial_max + part, mask=known, other=float("-inf"))
            sums = tl.load(partial_sum + part, mask=known, other=0.0)
            mask = known[:, None]
            if VALUE_DIM != BLOCK_E:
                mask = mask & (e < VALUE_DIM)[None, :]
            cells = partial_acc + (part * VALUE_DIM)[:, None] + e[None, :]
            parts = tl.load(cells, mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(tops - finite_top)
            decay = tl.exp2(top - finite_top)
            total = total * decay + tl.sum(sums * weights, 0)
            acc = acc * decay + tl.sum(parts * weights[:, None], 0)
            top = new_top
        result = acc * (1.0 / tl.where(total == 0.0, 1.0, total))
        tl.store(out + row * VALUE_DIM + e, result.to(out.dtype.element_ty), mask=e < VALUE_DIM)
