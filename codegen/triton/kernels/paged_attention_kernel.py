"""The device side of paged attention: what paged_attention.py puts into a kernel's text.

Rows of a tile are (token, head) pairs of one KV head, so that each byte of the cache is read once
for a whole group of heads. Softmax is online (Milakov & Gimelshein, 1805.02867), in base 2; a
sequence's keys may be split over programs, whose partial results `_merge` joins (Flash-Decoding).
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _sequence_of(query_start, num_seqs, block, BLOCK_Q: tl.constexpr):
    """The sequence that a block of rows belongs to: the last b with first_block(b) <= block, where
    first_block(b) = query_start[b] // BLOCK_Q + b + 1. Rows before the first sequence are -1's,
    rows behind the last one B's.
    """
    count = 0
    # Counted, not searched: all starts come in one trip to memory instead of log2(B) in a row.
    for first in tl.range(0, num_seqs + 1, 128, num_stages=1):
        index = first + tl.arange(0, 128)
        known = index <= num_seqs
        starts = tl.load(query_start + index, mask=known, other=0).to(tl.int32)
        begun = known & (starts // BLOCK_Q + index + 1 <= block)
        count += tl.sum(begun.to(tl.int32), 0)
    return count - 1


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) loses its digits near 0, where the series has all of them.
    square = x * x
    series = 0.13333333333333333 + square * (-0.05396825396825397 + square * 0.021869488536155203)
    near = x * (1.0 + square * (-0.3333333333333333 + square * series))
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def _seen(
    scores,
    key_ok,
    distance,
    slope,
    first,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    FACTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores capped and biased, -inf where a row does not see the key. A FACTOR of 1 says that they
    are scaled here, and not within the exponent. ``first`` is which keys are seen from beyond the
    window; None for no key.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if SOFTCAP is None:
        if FACTOR == 1.0:
            scores = scores * (SCALE * LOG2E)
    else:
        scores = _tanh(scores * (SCALE / SOFTCAP)) * (SOFTCAP * LOG2E)
    if slope is not None:
        scores = scores - slope[:, None] * distance.to(tl.float32)
    if MASKED:
        visible = key_ok[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if WINDOW is not None:
            near = distance < WINDOW
            if first is not None:
                near = near | first[None, :]
            visible = visible & near
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _weights_of(scores, row_max, row_sum, FACTOR: tl.constexpr):
    """A tile's share in an online softmax: weights, what sums until now become smaller by, and the
    rows' new maxima and sums of weights.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * FACTOR - (finite_max * FACTOR)[:, None])
    decay = tl.exp2((row_max - finite_max) * FACTOR)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def _meet(
    query,
    far_query,
    query_pos,
    acc,
    row_max,
    row_sum,
    slope,
    k_rows,
    v_rows,
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
    PAGE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    NUM_SINKS: tl.constexpr,
):
    """Rows meet one tile of keys. Where it is not MASKED, each row sees all of them. The first
    NUM_SINKS keys, which lie in the tile then, meet ``far_query``.
    """
    BLOCK_D: tl.constexpr = query.shape[1]
    BLOCK_E: tl.constexpr = acc.shape[1]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key_pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    size = page_size if PAGE is None else PAGE
    first = None
    if MASKED:
        key_ok = (key_pos >= low) & (key_pos < high)
        if NUM_SINKS > 0:
            first = key_pos < NUM_SINKS
            key_ok = ((key_pos >= low) | first) & (key_pos < high)
        page = tl.load(pages + key_pos // size, mask=key_ok, other=0)
    else:
        key_ok = None
        page = tl.load(pages + key_pos // size)
    page = tl.maximum(tl.minimum(page, num_pages - 1), 0)
    slot = page.to(tl.int64) * size + key_pos % size
    k_cells = (k_rows + slot * (KV_HEADS * HEAD_DIM))[:, None] + d[None, :]
    v_cells = (v_rows + slot * (KV_HEADS * VALUE_DIM))[:, None] + e[None, :]
    if MASKED:
        key = tl.load(k_cells, mask=key_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        value = tl.load(v_cells, mask=key_ok[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            key = tl.load(k_cells)
        else:
            key = tl.load(k_cells, mask=(d < HEAD_DIM)[None, :], other=0.0)
        if VALUE_DIM == BLOCK_E:
            value = tl.load(v_cells)
        else:
            value = tl.load(v_cells, mask=(e < VALUE_DIM)[None, :], other=0.0)

    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if NUM_SINKS > 0:
        far = tl.dot(far_query, tl.trans(key), input_precision="ieee")
        scores = tl.where((key_pos < NUM_SINKS)[None, :], far, scores)
    distance = query_pos[:, None] - key_pos[None, :]
    scores = _seen(
        scores, key_ok, distance, slope, first, SCALE, SOFTCAP, CAUSAL, WINDOW, FACTOR, MASKED
    )  # fmt: skip
    weights, decay, row_max, row_sum = _weights_of(scores, row_max, row_sum, FACTOR)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start,
    sinks,
    alibi,
    q_sinks,
    out,
    partial_acc,
    partial_max,
    partial_sum,
    q_offset,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    num_tokens,
    num_seqs,
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
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # q: [T, H, D] strided; q_sinks: [T, H, D]; caches: [N, P, G, D], [N, P, G, E]; out: [T, H, E]
    # partial_acc: f32 [T, H, splits, E]; partial_max, partial_sum: f32 [T, H, splits]
    LOG2E: tl.constexpr = 1.4426950408889634
    # Scores whose order scaling keeps are scaled within the exponent, by one rounding with the
    # maximum, as flash attention does: its very bits, and a product less.
    PLAIN: tl.constexpr = SOFTCAP is None and sinks is None and alibi is None and SCALE > 0
    FACTOR: tl.constexpr = SCALE * LOG2E if PLAIN else 1.0
    HEADS: tl.constexpr = (GROUP + HEAD_CHUNKS - 1) // HEAD_CHUNKS
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    # Where keys are many, the last rows meet the most: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // HEAD_CHUNKS
    split = tl.program_id(2)

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
    share = (tiles + splits - 1) // splits
    begin = first_tile + tl.minimum(split * share, tiles)
    end = first_tile + tl.minimum((split + 1) * share, tiles)

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
        # A sink is a first key without a value; one split has it, so that it counts once.
        sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        row_max = tl.where(split == 0, sink, row_max)
        row_sum = tl.where(split == 0, 1.0, row_sum)
    slope = None
    if alibi is not None:
        slope = tl.load(alibi + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
    acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)
    k_rows = k_cache + kv_head * HEAD_DIM
    v_rows = v_cache + kv_head * VALUE_DIM
    pages = block_tables + seq.to(tl.int64) * table_width

    if NUM_SINKS > 0:
        far_rows = q_sinks + (token.to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
        far_query = tl.load(far_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
        reached = tl.minimum((NUM_SINKS + BLOCK_N - 1) // BLOCK_N, (high + BLOCK_N - 1) // BLOCK_N)
        for tile in range(0, tl.where(split == 0, reached, 0)):
            acc, row_max, row_sum = _meet(
                query, far_query, query_pos, acc, row_max, row_sum, slope, k_rows, v_rows, pages,
                tile, low, high, num_pages, page_size, KV_HEADS, HEAD_DIM, VALUE_DIM, SCALE,
                SOFTCAP, CAUSAL, WINDOW, PAGE, FACTOR, BLOCK_N, True, NUM_SINKS,
            )  # fmt: skip

    # Tiles of which each row sees all keys need no masks; they lie between those that do.
    full_begin = begin
    full_end = begin
    if INNER:
        full_end = high // BLOCK_N
        if CAUSAL:
            full_end = tl.minimum(full_end, (first_pos + 1) // BLOCK_N)
        if WINDOW is not None:
            last_low = tl.maximum(first_pos + BLOCK_Q - WINDOW, 0)
            full_begin = tl.maximum(begin, (last_low + BLOCK_N - 1) // BLOCK_N)
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    for stretch in tl.static_range(0 if INNER and WINDOW is not None else 1 if INNER else 2, 3):
        since = begin if stretch == 0 else full_begin if stretch == 1 else full_end
        until = full_begin if stretch == 0 else full_end if stretch == 1 else end
        for tile in range(since, until):
            acc, row_max, row_sum = _meet(
                query, None, query_pos, acc, row_max, row_sum, slope, k_rows, v_rows, pages, tile,
                low, high, num_pages, page_size, KV_HEADS, HEAD_DIM, VALUE_DIM, SCALE, SOFTCAP,
                CAUSAL, WINDOW, PAGE, FACTOR, BLOCK_N, stretch != 1, 0,
            )  # fmt: skip

    row = token.to(tl.int64) * (KV_HEADS * GROUP) + head
    out_mask = row_ok[:, None]
    if VALUE_DIM != BLOCK_E:
        out_mask = out_mask & (e < VALUE_DIM)[None, :]
    if splits == 1:
        result = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
        out_cells = out + (row * VALUE_DIM)[:, None] + e[None, :]
        tl.store(out_cells, result.to(out.dtype.element_ty), mask=out_mask)
    else:
        part = row * splits + split
        tl.store(partial_max + part, row_max * FACTOR, mask=row_ok)
        tl.store(partial_sum + part, row_sum, mask=row_ok)
        # What saw no key is not read again either; a NaN sum is.
        part_cells = partial_acc + (part * VALUE_DIM)[:, None] + e[None, :]
        tl.store(part_cells, acc, mask=out_mask & (row_sum != 0.0)[:, None])


@triton.jit
def _merge(
    partial_acc,
    partial_max,
    partial_sum,
    out,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # One row of out a program; BLOCK_S >= splits
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, BLOCK_S)
    e = tl.arange(0, BLOCK_E)
    part = row * splits + split
    tops = tl.load(partial_max + part, mask=split < splits, other=float("-inf"))
    sums = tl.load(partial_sum + part, mask=split < splits, other=0.0)
    acc_mask = (sums != 0.0)[:, None] & (e < VALUE_DIM)[None, :]
    cells = partial_acc + (part * VALUE_DIM)[:, None] + e[None, :]
    acc = tl.load(cells, mask=acc_mask, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(tops - top)
    total = tl.sum(sums * weights, 0)
    result = tl.sum(acc * weights[:, None], 0) * (1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(out + row * VALUE_DIM + e, result.to(out.dtype.element_ty), mask=e < VALUE_DIM)
