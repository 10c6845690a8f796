"""The device side of paged decode attention over codes: what scaled_decode.py puts into a kernel's
text, beside functions of paged_decode_kernel.py.

Codes become numbers of the query's type in registers, which is exact. The scale of a key joins its
scores, the scale of a value the weight that it is added up with; sums are float32, as over numbers.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .paged_attention_kernel import _tanh
from .paged_decode_kernel import (
    _cache_rows,
    _extent,
    _first_tiles,
    _page_ids,
    _prefetch,
    _slots,
)


@triton.jit
def _weighted(acc, weights, value, v_scale):
    """``acc + weights @ (value * v_scale)`` for weights f32 [M, N], and for codes [N, E] that have
    become numbers.
    """
    scaled = weights * v_scale[None, :]
    if value.dtype == tl.float16:
        # A scale of 1 / 448 would bring small weights below what float16 has digits for.
        top = tl.max(v_scale, 0)
        top = tl.where(top > 0.0, top, 1.0)
        part = tl.dot((scaled * (1.0 / top)).to(tl.float16), value, input_precision="ieee")
        acc += part * top
    else:
        acc = tl.dot(scaled.to(value.dtype), value, acc, input_precision="ieee")
    return acc


@triton.jit
def _scaled_step(
    query,
    far_query,
    first,
    key,
    value,
    k_scale,
    v_scale,
    key_ok,
    distance,
    slope,
    row_max,
    sums,
    acc,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """As ``_step`` of paged_decode_kernel.py, for codes and their scales f32 [BLOCK_N]."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * k_scale[None, :]
    if first is not None:
        far = tl.dot(far_query, tl.trans(key), input_precision="ieee") * k_scale[None, :]
        scores = tl.where(first[None, :], far, scores)
    if SOFTCAP is not None:
        scores = _tanh(scores * (SCALE / SOFTCAP)) * (SOFTCAP * 1.4426950408889634)
    elif FACTOR == 1.0:
        scores = scores * (SCALE * 1.4426950408889634)
    if slope is not None:
        scores = scores - slope[:, None] * distance.to(tl.float32)[None, :]
    scores = tl.where(key_ok[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * FACTOR - (finite_max * FACTOR)[:, None])
    decay = tl.exp2((row_max - finite_max) * FACTOR)
    sums = sums * decay[:, None] + weights
    acc = _weighted(acc * decay[:, None], weights, value, v_scale)
    return new_max, sums, acc


@triton.jit
def _scaled_decode(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    sinks,
    alibi,
    k_scale,
    v_scale,
    q_sinks,
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
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    LEAST: tl.constexpr,
    SHARE: tl.constexpr,
    BY_PAGE: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # q: [B, H, D] strided; q_sinks: [B, H, D]; codes: [N, P, G, D], [N, P, G, E]
    # scales: f32 [N, P, G]
    # out: [B, H, E]; partial_acc: f32 [B, H, splits, E]; partial_max, partial_sum: f32 [.., splits]
    LOG2E: tl.constexpr = 1.4426950408889634
    # As over numbers: scores whose order scaling keeps are scaled within the exponent.
    PLAIN: tl.constexpr = SOFTCAP is None and sinks is None and alibi is None and SCALE > 0
    FACTOR: tl.constexpr = SCALE * LOG2E if PLAIN else 1.0
    HEADS: tl.constexpr = (GROUP + HEAD_CHUNKS - 1) // HEAD_CHUNKS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) // HEAD_CHUNKS
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + seq).to(tl.int32)
    low, high, first_tile, tiles, share = _extent(
        length, table_width * page_size, splits, WINDOW, NUM_SINKS, BLOCK_N, LEAST, SHARE
    )
    begin = first_tile + tl.minimum(split * share, tiles)
    end = first_tile + tl.minimum((split + 1) * share, tiles)
    used = 1
    if partial_acc is not None:
        used = (tiles + share - 1) // share
    # The first split writes a result without keys, too.
    if (begin < end) | (split == 0):
        table = block_tables + seq * table_width
        k_rows = k_cache + kv_head * HEAD_DIM
        v_rows = v_cache + kv_head * VALUE_DIM
        # Page ids come a tile ahead of the keys, which then wait for nothing.
        ids = _page_ids(table, begin * BLOCK_N, low, high, page_size, BLOCK_N, BY_PAGE)
        if PDL:
            for ahead in tl.static_range(PREFETCH):
                first = tl.minimum(begin + ahead, tl.maximum(end - 1, begin)) * BLOCK_N
                some = ids
                if ahead > 0:
                    some = _page_ids(table, first, low, high, page_size, BLOCK_N, BY_PAGE)
                slot = _slots(some, first, num_pages, page_size, BLOCK_N, BY_PAGE)
                _prefetch(k_rows + slot * (KV_HEADS * HEAD_DIM), HEAD_DIM, BLOCK_D)
                _prefetch(v_rows + slot * (KV_HEADS * VALUE_DIM), VALUE_DIM, BLOCK_E)
            tl.extra.cuda.gdc_wait()

        index = tl.arange(0, BLOCK_M)
        group_head = (tl.program_id(0) % HEAD_CHUNKS) * HEADS + index
        row_ok = (index < HEADS) & (group_head < GROUP)
        head = kv_head * GROUP + group_head
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        q_mask = row_ok[:, None]
        if HEAD_DIM != BLOCK_D:
            q_mask = q_mask & (d < HEAD_DIM)[None, :]
        q_rows = q + q_offset + seq * q_stride_t + head.to(tl.int64) * q_stride_h
        query = tl.load(q_rows[:, None] + (d * q_stride_d)[None, :], mask=q_mask, other=0.0)

        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if sinks is not None:
            # A sink is a first key without a value; one split has it, so that it counts once.
            sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
            sink = tl.where(split == 0, sink, float("-inf"))
            row_max = sink
        slope = None
        if alibi is not None:
            slope = tl.load(alibi + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        sums = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)

        if NUM_SINKS > 0:
            far_rows = q_sinks + (seq * (KV_HEADS * GROUP) + head) * HEAD_DIM
            far_query = tl.load(far_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
            for tile in range(0, _first_tiles(split == 0, high, NUM_SINKS, BLOCK_N)):
                first = tile * BLOCK_N
                some = _page_ids(table, first, 0, high, page_size, BLOCK_N, BY_PAGE)
                slot = _slots(some, first, num_pages, page_size, BLOCK_N, BY_PAGE)
                key_pos = first + tl.arange(0, BLOCK_N)
                sink_ok = key_pos < NUM_SINKS
                key_ok = ((key_pos >= low) | sink_ok) & (key_pos < high)
                k = k_rows + slot * (KV_HEADS * HEAD_DIM)
                v = v_rows + slot * (KV_HEADS * VALUE_DIM)
                scale_at = slot * KV_HEADS + kv_head
                row_max, sums, acc = _scaled_step(
                    query,
                    far_query,
                    sink_ok,
                    _cache_rows(k, key_ok, HEAD_DIM, BLOCK_D, EVICT),
                    _cache_rows(v, key_ok, VALUE_DIM, BLOCK_E, EVICT),
                    tl.load(k_scale + scale_at, mask=key_ok, other=0.0),
                    tl.load(v_scale + scale_at, mask=key_ok, other=0.0),
                    key_ok,
                    length - 1 - key_pos,
                    slope,
                    row_max,
                    sums,
                    acc,
                    SCALE,
                    SOFTCAP,
                    FACTOR,
                )

        for tile in range(begin, end):
            first = tile * BLOCK_N
            slot = _slots(ids, first, num_pages, page_size, BLOCK_N, BY_PAGE)
            ids = _page_ids(table, first + BLOCK_N, low, high, page_size, BLOCK_N, BY_PAGE)
            key_pos = first + tl.arange(0, BLOCK_N)
            key_ok = (key_pos >= low) & (key_pos < high)
            k = k_rows + slot * (KV_HEADS * HEAD_DIM)
            v = v_rows + slot * (KV_HEADS * VALUE_DIM)
            scale_at = slot * KV_HEADS + kv_head
            row_max, sums, acc = _scaled_step(
                query,
                None,
                None,
                _cache_rows(k, key_ok, HEAD_DIM, BLOCK_D, EVICT),
                _cache_rows(v, key_ok, VALUE_DIM, BLOCK_E, EVICT),
                tl.load(k_scale + scale_at, mask=key_ok, other=0.0),
                tl.load(v_scale + scale_at, mask=key_ok, other=0.0),
                key_ok,
                length - 1 - key_pos,
                slope,
                row_max,
                sums,
                acc,
                SCALE,
                SOFTCAP,
                FACTOR,
            )

        row_sum = tl.sum(sums, 1)
        if sinks is not None:
            row_sum += tl.exp2(sink - tl.where(row_max == float("-inf"), 0.0, row_max))
        out_mask = row_ok[:, None]
        if VALUE_DIM != BLOCK_E:
            out_mask = out_mask & (e < VALUE_DIM)[None, :]
        row = seq * (KV_HEADS * GROUP) + head
        if used <= 1:
            result = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            cells = out + (row * VALUE_DIM)[:, None] + e[None, :]
            tl.store(cells, result.to(out.dtype.element_ty), mask=out_mask)
        else:
            parts = row * splits + split
            tl.store(partial_max + parts, row_max * FACTOR, mask=row_ok)
            tl.store(partial_sum + parts, row_sum, mask=row_ok)
            tl.store(partial_acc + (parts * VALUE_DIM)[:, None] + e[None, :], acc, mask=out_mask)
    elif PDL:
        tl.extra.cuda.gdc_wait()
