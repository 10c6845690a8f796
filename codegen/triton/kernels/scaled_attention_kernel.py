"""The device side of paged attention over codes for many tokens: what scaled_attention.py puts into
a kernel's text, beside functions of paged_attention_kernel.py.

As there, rows of a tile are (token, head) pairs of one KV head. Codes and scales are taken as in
scaled_decode_kernel.py. Keys are not split: decode has a kernel of its own.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .paged_attention_kernel import _seen, _sequence_of, _weights_of
from .scaled_decode_kernel import _weighted


@triton.jit
def _scaled_meet(
    query,
    far_query,
    query_pos,
    acc,
    row_max,
    row_sum,
    slope,
    k_rows,
    v_rows,
    k_scales,
    v_scales,
    pages,
    tile,
    low,
    high,
    num_pages,
    page_size,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SINKS: tl.constexpr,
):
    """As ``_meet`` of paged_attention_kernel.py, MASKED, for codes and their scales."""
    BLOCK_D: tl.constexpr = query.shape[1]
    BLOCK_E: tl.constexpr = acc.shape[1]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key_pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_ok = (key_pos >= low) & (key_pos < high)
    first = None
    if NUM_SINKS > 0:
        first = key_pos < NUM_SINKS
        key_ok = ((key_pos >= low) | first) & (key_pos < high)
    page = tl.load(pages + key_pos // page_size, mask=key_ok, other=0)
    page = tl.maximum(tl.minimum(page, num_pages - 1), 0)
    slot = page.to(tl.int64) * page_size + key_pos % page_size
    k_mask = key_ok[:, None]
    v_mask = key_ok[:, None]
    if HEAD_DIM != BLOCK_D:
        k_mask = k_mask & (d < HEAD_DIM)[None, :]
    if VALUE_DIM != BLOCK_E:
        v_mask = v_mask & (e < VALUE_DIM)[None, :]
    k_cells = (k_rows + slot * (KV_HEADS * HEAD_DIM))[:, None] + d[None, :]
    v_cells = (v_rows + slot * (KV_HEADS * VALUE_DIM))[:, None] + e[None, :]
    key = tl.load(k_cells, mask=k_mask, other=0.0).to(query.dtype)
    value = tl.load(v_cells, mask=v_mask, other=0.0).to(query.dtype)
    k_by = tl.load(k_scales + slot * KV_HEADS, mask=key_ok, other=0.0)
    v_by = tl.load(v_scales + slot * KV_HEADS, mask=key_ok, other=0.0)

    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * k_by[None, :]
    if NUM_SINKS > 0:
        far = tl.dot(far_query, tl.trans(key), input_precision="ieee") * k_by[None, :]
        scores = tl.where((key_pos < NUM_SINKS)[None, :], far, scores)
    distance = query_pos[:, None] - key_pos[None, :]
    scores = _seen(
        scores, key_ok, distance, slope, first, SCALE, SOFTCAP, CAUSAL, WINDOW, FACTOR, True
    )  # fmt: skip
    weights, decay, row_max, row_sum = _weights_of(scores, row_max, row_sum, FACTOR)
    acc = _weighted(acc * decay[:, None], weights, value, v_by)
    return acc, row_max, row_sum


@triton.jit
def _scaled_attend(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start,
    sinks,
    alibi,
    k_scale,
    v_scale,
    q_sinks,
    out,
    q_offset,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    num_tokens,
    num_seqs,
    num_pages,
    table_width,
    page_size,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # q: [T, H, D] strided; q_sinks: [T, H, D]; codes: [N, P, G, D], [N, P, G, E]
    # scales: f32 [N, P, G]; out: [T, H, E]
    LOG2E: tl.constexpr = 1.4426950408889634
    # As over numbers: scores whose order scaling keeps are scaled within the exponent.
    PLAIN: tl.constexpr = SOFTCAP is None and sinks is None and alibi is None and SCALE > 0
    FACTOR: tl.constexpr = SCALE * LOG2E if PLAIN else 1.0
    HEADS: tl.constexpr = (GROUP + HEAD_CHUNKS - 1) // HEAD_CHUNKS
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    block = tl.program_id(0)
    kv_head = tl.program_id(1) // HEAD_CHUNKS

    seq = _sequence_of(query_start, num_seqs, block, BLOCK_Q)
    start = tl.load(query_start + seq, mask=seq >= 0, other=0).to(tl.int32)
    stop = tl.load(query_start + seq + 1, mask=seq < num_seqs, other=num_tokens).to(tl.int32)
    length = tl.load(seq_lens + seq, mask=(seq >= 0) & (seq < num_seqs), other=0).to(tl.int32)
    start = tl.maximum(start, 0)
    stop = tl.minimum(stop, num_tokens)
    first_block = tl.where(seq >= 0, start // BLOCK_Q + seq + 1, 0)
    first_row = start + (block - first_block) * BLOCK_Q

    index = tl.arange(0, BLOCK_M)
    token = first_row + index // HEADS
    group_head = (tl.program_id(1) % HEAD_CHUNKS) * HEADS + index % HEADS
    row_ok = (index < BLOCK_Q * HEADS) & (token < stop) & (group_head < GROUP)
    head = kv_head * GROUP + group_head
    query_pos = length - stop + token

    # Keys that some row of this block sees; no others are ever read.
    first_pos = length - stop + first_row
    high = tl.minimum(length, table_width * page_size)
    if CAUSAL:
        high = tl.minimum(high, first_pos + tl.minimum(BLOCK_Q, stop - first_row))
    low = 0
    if WINDOW is not None:
        low = tl.maximum(first_pos - (WINDOW - 1), 0)
    high = tl.where(first_row < stop, high, 0)
    first_tile = low // BLOCK_N
    if NUM_SINKS > 0:  # the first tiles are walked by themselves
        first_tile = tl.maximum(first_tile, (NUM_SINKS + BLOCK_N - 1) // BLOCK_N)
    tiles = tl.maximum((high + BLOCK_N - 1) // BLOCK_N - first_tile, 0)

    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q_mask = row_ok[:, None]
    if HEAD_DIM != BLOCK_D:
        q_mask = q_mask & (d < HEAD_DIM)[None, :]
    q_rows = q + q_offset + token.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    query = tl.load(q_rows[:, None] + (d * q_stride_d)[None, :], mask=q_mask, other=0.0)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    if sinks is not None:
        # A sink is a first key without a value.
        row_max = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    slope = None
    if alibi is not None:
        slope = tl.load(alibi + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
    acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)
    pages = block_tables + seq.to(tl.int64) * table_width

    k_rows = k_cache + kv_head * HEAD_DIM
    v_rows = v_cache + kv_head * VALUE_DIM
    if NUM_SINKS > 0:
        far_rows = q_sinks + (token.to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
        far_query = tl.load(far_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
        reached = tl.minimum((NUM_SINKS + BLOCK_N - 1) // BLOCK_N, (high + BLOCK_N - 1) // BLOCK_N)
        for tile in range(0, reached):
            acc, row_max, row_sum = _scaled_meet(
                query, far_query, query_pos, acc, row_max, row_sum, slope, k_rows, v_rows,
                k_scale + kv_head, v_scale + kv_head, pages, tile, low, high, num_pages, page_size,
                KV_HEADS, HEAD_DIM, VALUE_DIM, SCALE, SOFTCAP, CAUSAL, WINDOW, FACTOR, BLOCK_N,
                NUM_SINKS,
            )  # fmt: skip

    for tile in range(first_tile, first_tile + tiles):
        acc, row_max, row_sum = _scaled_meet(
            query, None, query_pos, acc, row_max, row_sum, slope, k_rows, v_rows,
            k_scale + kv_head, v_scale + kv_head, pages, tile, low, high, num_pages, page_size,
            KV_HEADS, HEAD_DIM, VALUE_DIM, SCALE, SOFTCAP, CAUSAL, WINDOW, FACTOR, BLOCK_N, 0,
        )  # fmt: skip

    row = token.to(tl.int64) * (KV_HEADS * GROUP) + head
    out_mask = row_ok[:, None]
    if VALUE_DIM != BLOCK_E:
        out_mask = out_mask & (e < VALUE_DIM)[None, :]
    result = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_cells = out + (row * VALUE_DIM)[:, None] + e[None, :]
    tl.store(out_cells, result.to(out.dtype.element_ty), mask=out_mask)
