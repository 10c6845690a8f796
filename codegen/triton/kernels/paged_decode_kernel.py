"""The device side of paged decode attention: what paged_decode.py puts into a kernel's text.

Rows of a tile are the query heads of one KV head, so that each byte of the cache is read once for
the whole group. Softmax is online (Milakov & Gimelshein, 1805.02867), in base 2; a sequence's keys
are split over programs, whose partial results `_merge` joins (Flash-Decoding).
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .paged_attention_kernel import _tanh


@triton.jit
def _extent(
    length,
    capacity,
    splits,
    WINDOW: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    SHARE: tl.constexpr,
):
    """The keys of a sequence that its token sees, low to high, and how they are cut: the first
    tile, the number of tiles, the tiles of a split. That depends on the sequence alone where SHARE,
    the tiles of every split, is given; else splits have LEAST tiles at least. Tiles with any of the
    NUM_SINKS first keys come before these, in the first split.
    """
    high = tl.minimum(length, capacity)
    low = 0
    if WINDOW is not None:
        low = tl.maximum(length - WINDOW, 0)
    first = low // BLOCK_N
    if NUM_SINKS > 0:
        first = tl.maximum(first, (NUM_SINKS + BLOCK_N - 1) // BLOCK_N)
    tiles = tl.maximum((high + BLOCK_N - 1) // BLOCK_N - first, 0)
    share = SHARE
    if SHARE is None:
        share = tl.maximum((tiles + splits - 1) // splits, LEAST)
    return low, high, first, tiles, share


@triton.jit
def _page_ids(table, first, low, high, page_size, BLOCK_N: tl.constexpr, BY_PAGE: tl.constexpr):
    """Page ids of the keys from ``first`` on, as the table has them: one a key, or with BY_PAGE
    one a page, a scalar where the tile lies in one. What no key needs is 0, and not read.
    """
    if not BY_PAGE:
        key_pos = first + tl.arange(0, BLOCK_N)
        key_ok = (key_pos >= low) & (key_pos < high)
        ids = tl.load(table + key_pos // page_size, mask=key_ok, other=0)
    elif page_size >= BLOCK_N:
        ids = tl.load(table + first // page_size, mask=first < high, other=0)
    else:
        page = first // page_size + tl.arange(0, BLOCK_N // page_size)
        ids = tl.load(table + page, mask=page * page_size < high, other=0)
    return ids


@triton.jit
def _slots(ids, first, num_pages, page_size, BLOCK_N: tl.constexpr, BY_PAGE: tl.constexpr):
    """Where the keys from ``first`` on lie, i64 [BLOCK_N] in tokens of the cache. Ids that it does
    not have are taken for others: no wild reads.
    """
    start = tl.maximum(tl.minimum(ids, num_pages - 1), 0).to(tl.int64) * page_size
    if not BY_PAGE:
        slot = start + (first + tl.arange(0, BLOCK_N)) % page_size
    elif page_size >= BLOCK_N:
        slot = start + first % page_size + tl.arange(0, BLOCK_N)
    else:
        slot = tl.reshape(start[:, None] + tl.arange(0, page_size)[None, :], [BLOCK_N])
    return slot


@triton.jit
def _cache_rows(rows, key_ok, DIM: tl.constexpr, BLOCK: tl.constexpr, EVICT: tl.constexpr):
    """Rows of a cache [BLOCK_N, BLOCK], zero where no key is: what lies there may be NaN. A
    quantized cache is decoded here.
    """
    d = tl.arange(0, BLOCK)
    mask = key_ok[:, None]
    if DIM != BLOCK:
        mask = mask & (d < DIM)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def _prefetch(rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Asks for rows of a cache to be brought to L2, a line of 128 bytes each. A row that is still
    to be written does no harm: all of the device's writes go through L2.
    """
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (BLOCK + LINE - 1) // LINE
    line = tl.minimum(tl.arange(0, LINES) * LINE, DIM - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [rows[:, None] + line[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _first_tiles(first_split, high, NUM_SINKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles with first keys a split has."""
    tiles = tl.minimum((NUM_SINKS + BLOCK_N - 1) // BLOCK_N, (high + BLOCK_N - 1) // BLOCK_N)
    return tl.where(first_split, tiles, 0)


@triton.jit
def _step(
    query,
    far_query,
    first,
    key,
    value,
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
    """The softmax of some keys joined to that of those before: (row_max, sums, acc). Sums stay by
    column, [BLOCK_M, BLOCK_N]: warps need not meet for them before the end. The keys that are
    ``first`` meet ``far_query``; None for no key.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if first is not None:
        far = tl.dot(far_query, tl.trans(key), input_precision="ieee")
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
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
    return new_max, sums, acc


@triton.jit
def _split(
    q,
    k_rows,
    v_rows,
    table,
    sinks,
    alibi,
    far_rows,
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
    first_split,
    used,
    row,
    part,
    part_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_PAGE: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles begin to end for one KV head's queries; the result itself where it is all in here."""
    LOG2E: tl.constexpr = 1.4426950408889634
    # Scores whose order scaling keeps are scaled within the exponent, by one rounding with the
    # maximum, as flash attention does: its very bits, and a product less.
    PLAIN: tl.constexpr = SOFTCAP is None and sinks is None and alibi is None and SCALE > 0
    FACTOR: tl.constexpr = SCALE * LOG2E if PLAIN else 1.0
    HEADS: tl.constexpr = (GROUP + HEAD_CHUNKS - 1) // HEAD_CHUNKS
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
    head = tl.program_id(0) // HEAD_CHUNKS * GROUP + group_head
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q_mask = row_ok[:, None]
    if HEAD_DIM != BLOCK_D:
        q_mask = q_mask & (d < HEAD_DIM)[None, :]
    q_rows = q + head.to(tl.int64) * q_stride_h
    query = tl.load(q_rows[:, None] + (d * q_stride_d)[None, :], mask=q_mask, other=0.0)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks is not None:
        # A sink is a first key without a value; one split has it, so that it counts once.
        sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        sink = tl.where(first_split, sink, float("-inf"))
        row_max = sink
    slope = None
    if alibi is not None:
        slope = tl.load(alibi + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
    sums = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)

    if NUM_SINKS > 0:
        far_rows += head.to(tl.int64) * HEAD_DIM
        far_query = tl.load(far_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
        for tile in range(0, _first_tiles(first_split, high, NUM_SINKS, BLOCK_N)):
            first = tile * BLOCK_N
            some = _page_ids(table, first, 0, high, page_size, BLOCK_N, BY_PAGE)
            slot = _slots(some, first, num_pages, page_size, BLOCK_N, BY_PAGE)
            key_pos = first + tl.arange(0, BLOCK_N)
            sink_ok = key_pos < NUM_SINKS
            key_ok = ((key_pos >= low) | sink_ok) & (key_pos < high)
            k = k_rows + slot * (KV_HEADS * HEAD_DIM)
            v = v_rows + slot * (KV_HEADS * VALUE_DIM)
            row_max, sums, acc = _step(
                query,
                far_query,
                sink_ok,
                _cache_rows(k, key_ok, HEAD_DIM, BLOCK_D, EVICT),
                _cache_rows(v, key_ok, VALUE_DIM, BLOCK_E, EVICT),
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
        key = _cache_rows(k, key_ok, HEAD_DIM, BLOCK_D, EVICT)
        value = _cache_rows(v, key_ok, VALUE_DIM, BLOCK_E, EVICT)
        distance = length - 1 - key_pos
        row_max, sums, acc = _step(
            query,
            None,
            None,
            key,
            value,
            key_ok,
            distance,
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
    if used <= 1:
        result = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
        cells = out + ((row + head) * VALUE_DIM)[:, None] + e[None, :]
        tl.store(cells, result.to(out.dtype.element_ty), mask=out_mask)
    else:
        parts = (row + head) * part_stride + part
        tl.store(partial_max + parts, row_max * FACTOR, mask=row_ok)
        tl.store(partial_sum + parts, row_sum, mask=row_ok)
        tl.store(partial_acc + (parts * VALUE_DIM)[:, None] + e[None, :], acc, mask=out_mask)


@triton.jit
def _decode(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
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
    # q: [B, H, D] strided; q_sinks: [B, H, D]; caches: [N, P, G, D], [N, P, G, E]; out: [B, H, E]
    # partial_acc: f32 [B, H, splits, E]; partial_max, partial_sum: f32 [B, H, splits]
    # Heads are neighbours in the grid: programs that run at once read the same DRAM pages.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) // HEAD_CHUNKS
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + seq).to(tl.int32)
    low, high, first, tiles, share = _extent(
        length, table_width * page_size, splits, WINDOW, NUM_SINKS, BLOCK_N, LEAST, SHARE
    )
    begin = first + tl.minimum(split * share, tiles)
    end = first + tl.minimum((split + 1) * share, tiles)
    used = 1
    if partial_acc is not None:
        used = (tiles + share - 1) // share
    far_rows = None
    if NUM_SINKS > 0:
        far_rows = q_sinks + seq * (KV_HEADS * GROUP * HEAD_DIM)
    # The first split writes a result without keys, too.
    if (begin < end) | (split == 0):
        _split(
            q + q_offset + seq * q_stride_t,
            k_cache + kv_head * HEAD_DIM,
            v_cache + kv_head * VALUE_DIM,
            block_tables + seq * table_width,
            sinks,
            alibi,
            far_rows,
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
            used,
            seq * (KV_HEADS * GROUP),
            split,
            splits,
            KV_HEADS,
            GROUP,
            HEAD_CHUNKS,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_D,
            BLOCK_E,
            SCALE,
            SOFTCAP,
            NUM_SINKS,
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
def _merge(
    partial_acc,
    partial_max,
    partial_sum,
    seq_lens,
    out,
    table_width,
    page_size,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    LEAST: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # One row of out a program, BLOCK_S of its splits at a time; one split wrote the row itself.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    seq = tl.program_id(1).to(tl.int64)
    row = seq * HEADS + tl.program_id(0)
    length = tl.load(seq_lens + seq).to(tl.int32)
    _, _, _, tiles, share = _extent(
        length, table_width * page_size, splits, WINDOW, NUM_SINKS, BLOCK_N, LEAST, SHARE
    )
    used = (tiles + share - 1) // share
    if PDL:
        tl.extra.cuda.gdc_wait()
    if used > 1:
        e = tl.arange(0, BLOCK_E)
        top = float("-inf")
        total = 0.0
        acc = tl.full([BLOCK_E], 0.0, tl.float32)
        for first in range(0, used, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S)
            part = row * splits + split
            tops = tl.load(partial_max + part, mask=split < used, other=float("-inf"))
            sums = tl.load(partial_sum + part, mask=split < used, other=0.0)
            mask = (split < used)[:, None]
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
