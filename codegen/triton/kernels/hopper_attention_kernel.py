"""The device side of prefill attention on Hopper: warps that load, warp groups that multiply.

After FlashAttention-3 (2407.08608): a warp brings queries, keys and values by TMA, a page at a
time, while two warp groups of 64 rows each have the scores of one tile and the sums of the one
before in flight, and weigh the former's keys meanwhile. Tiles are met from the last to the first,
so that those with masks come before the loop of those without.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_attention_loads import _produce, _told


@gluon.jit
def _softmax(
    scores,
    row_max,
    row_sum,
    query_pos,
    key,
    high,
    FACTOR: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    MASKED: gl.constexpr,
):
    """A tile's weights, what sums until now become smaller by, and the rows' maxima and sums."""
    if MASKED:
        BLOCK_N: gl.constexpr = scores.shape[1]
        columns: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        key_pos = key + gl.arange(0, BLOCK_N, layout=columns)
        visible = (key_pos < high)[None, :]
        distance = query_pos[:, None] - key_pos[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if WINDOW > 0:
            visible = visible & (distance < WINDOW)
        scores = gl.where(visible, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    finite_max = new_max
    if MASKED:
        finite_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores * FACTOR - (finite_max * FACTOR)[:, None])
    decay = gl.exp2((row_max - finite_max) * FACTOR)
    return weights, decay, new_max, row_sum * decay + gl.sum(weights, 1)


@gluon.jit
def _clear(v_tiles, stage, first, PAGE: gl.constexpr):
    """Zeros for the values of a tile from row ``first`` to the end of its page: no weight hides a
    NaN that memory not yet written may hold.
    """
    HALF: gl.constexpr = 64
    BLOCK_N: gl.constexpr = v_tiles.shape[1]
    HALVES: gl.constexpr = v_tiles.shape[2] // HALF
    COUNT: gl.constexpr = v_tiles.shape[0] * HALVES * BLOCK_N // PAGE
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    boxes = v_tiles._reinterpret(v_tiles.dtype, [COUNT, PAGE, HALF], v_tiles.layout)
    kept = gl.arange(0, PAGE, layout=gl.SliceLayout(1, spread)) < first % PAGE
    for part in gl.static_range(HALVES):
        box = boxes.index((stage * HALVES + part) * (BLOCK_N // PAGE) + first // PAGE)
        values = box.load(spread)
        box.store(gl.where(kept[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _pass(met, tiles, bars, STAGES: gl.constexpr):
    """Gives ``tiles`` tiles back as they come."""
    _q_ready, _q_free, k_ready, k_free, v_ready, v_free = bars
    for _ in range(tiles):
        stage = met % STAGES
        parity = (met // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), parity)
        mbarrier.arrive(k_free.index(stage))
        mbarrier.wait(v_ready.index(stage), parity)
        mbarrier.arrive(v_free.index(stage))
        met += 1
    return met


@gluon.jit
def _multiply(
    met,
    work,
    out,
    query,
    k_tiles,
    v_tiles,
    bars,
    WHICH: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    FACTOR: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    PAGE: gl.constexpr,
):
    """The attention of a group's 64 rows; tiles met until now."""
    kv_head, first_row, stop, origin, low, high, tiles = work
    _q_ready, _q_free, k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    BLOCK_Q: gl.constexpr = 128 // GROUP
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    sum_rows: gl.constexpr = gl.SliceLayout(1, sums_layout)
    written: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    nothing = gl.zeros([64, BLOCK_N], gl.float32, scores_layout)
    mine = WHICH * 64 + gl.arange(0, 64, layout=score_rows)
    index = WHICH * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, written))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, written))
    first_pos = origin + first_row
    first_tile = low // BLOCK_N
    query_pos = first_pos + mine // GROUP
    # Tiles of which each row sees all keys need no masks; they lie between those that do.
    full_end = high // BLOCK_N
    if CAUSAL:
        full_end = gl.minimum(full_end, (first_pos + 1) // BLOCK_N)
    full_begin = first_tile
    if WINDOW > 0:
        last_low = gl.maximum(first_pos + BLOCK_Q - WINDOW, 0)
        full_begin = gl.maximum(first_tile, (last_low + BLOCK_N - 1) // BLOCK_N)
    tile = first_tile + tiles - 1
    full_end = gl.maximum(gl.minimum(full_end, tile), full_begin)

    stage = met % STAGES
    mbarrier.wait(k_ready.index(stage), (met // STAGES) & 1)
    scores = warpgroup_mma(
        query, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(stage))
    row_max = gl.full([64], float("-inf"), gl.float32, score_rows)
    row_sum = gl.full([64], 0.0, gl.float32, score_rows)
    weights, _decay, row_max, row_sum = _softmax(
        scores, row_max, row_sum, query_pos, tile * BLOCK_N, high, FACTOR, CAUSAL, WINDOW,
        True,
    )  # fmt: skip
    weights = gl.convert_layout(weights.to(v_tiles.dtype), weights_layout)
    if high % PAGE != 0:
        mbarrier.wait(v_ready.index(stage), (met // STAGES) & 1)
        _clear(v_tiles, stage, high - tile * BLOCK_N, PAGE)
    acc = gl.zeros([64, DIM], gl.float32, sums_layout)
    for stretch in gl.static_range(3 if WINDOW > 0 else 2):
        # Masked before the diagonal's end, full, masked where the window ends.
        until = full_end if stretch == 0 else full_begin if stretch == 1 else first_tile
        for _ in range(until, gl.maximum(tile, until)):
            tile -= 1
            late = met % STAGES
            late_parity = (met // STAGES) & 1
            met += 1
            stage = met % STAGES
            mbarrier.wait(k_ready.index(stage), (met // STAGES) & 1)
            scores = warpgroup_mma(
                query, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False,
                is_async=True,
            )  # fmt: skip
            mbarrier.wait(v_ready.index(late), late_parity)
            sums = warpgroup_mma(weights, v_tiles.index(late), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_free.index(stage))
            fresh, decay, row_max, row_sum = _softmax(
                scores, row_max, row_sum, query_pos, tile * BLOCK_N, high, FACTOR, CAUSAL,
                WINDOW, stretch != 1,
            )  # fmt: skip
            fresh = gl.convert_layout(fresh.to(v_tiles.dtype), weights_layout)
            # Passed at once: a branch, past which the assembler moves no exponentials.
            mbarrier.wait(v_ready.index(late), late_parity)
            acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
            mbarrier.arrive(v_free.index(late))
            acc = acc * gl.convert_layout(decay, sum_rows)[:, None]
            weights = fresh
    stage = met % STAGES
    mbarrier.wait(v_ready.index(stage), (met // STAGES) & 1)
    sums = warpgroup_mma(weights, v_tiles.index(stage), acc, is_async=True)
    total = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
    mbarrier.arrive(v_free.index(stage))
    met += 1
    # The queries have been read: rows leave by way of their place, in whole lines.
    result = acc * gl.convert_layout(total, sum_rows)[:, None]
    query.store(result.to(out.dtype.element_ty))
    values = query.load(written)
    token = first_row + index // GROUP
    row = (token.to(gl.int64) * KV_HEADS + kv_head) * GROUP + index % GROUP
    gl.store(out + (row * DIM)[:, None] + column[None, :], values, (token < stop)[:, None])
    return met


@gluon.jit
def _consume(
    WHICH: gl.constexpr,
    out,
    q_tiles,
    k_tiles,
    v_tiles,
    told,
    bars,
    num_items,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    FACTOR: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    PAGE: gl.constexpr,
):
    q_ready, q_free = bars[0], bars[1]
    FIELDS: gl.constexpr = told.shape[0] // 2
    met = 0
    for turn in range(gl.cdiv(num_items, gl.num_programs(0))):
        slot = turn & 1
        mbarrier.wait(q_ready.index(slot), (turn >> 1) & 1)
        # Fields by their places in what `_work` finds.
        tiles = _told(told, slot, 7, FIELDS)
        if tiles > 0:
            kv_head = _told(told, slot, 1, FIELDS)
            first_row = _told(told, slot, 2, FIELDS)
            stop = _told(told, slot, 3, FIELDS)
            if first_row + WHICH * (64 // GROUP) < stop:
                origin = _told(told, slot, 4, FIELDS)
                low = _told(told, slot, 5, FIELDS)
                high = _told(told, slot, 6, FIELDS)
                work = (kv_head, first_row, stop, origin, low, high, tiles)
                met = _multiply(
                    met, work, out, q_tiles.index(slot * 2 + WHICH), k_tiles, v_tiles, bars, WHICH,
                    KV_HEADS, GROUP, FACTOR, CAUSAL, WINDOW, PAGE,
                )  # fmt: skip
            else:
                # One token's rows leave the second group none.
                met = _pass(met, tiles, bars, k_tiles.shape[0])
        fence_async_shared()
        mbarrier.arrive(q_free.index(slot))


@gluon.jit
def _attend_hopper(
    q_desc,
    k_desc,
    v_desc,
    block_tables,
    seq_lens,
    query_start,
    out,
    num_tokens,
    num_seqs,
    num_pages,
    table_width,
    num_items,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SCALE: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    BOTH_WAYS: gl.constexpr,
):
    # q_desc: [T, H, D] in boxes [64 / GROUP, GROUP, 64]; k_desc, v_desc: [N * P, G * D] in boxes
    # [P, 64]; out: [T, H, D]
    LOG2E: gl.constexpr = 1.4426950408889634
    lines: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    GROUPS: gl.constexpr = 2
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2 * GROUPS, 64, HEAD_DIM], lines)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], lines)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], lines)
    # Two items of 8 fields: the groups read one while the next one is found (``_tell``).
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    told = gl.allocate_shared_memory(gl.int32, [2 * 8, 1], plain)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for slot in gl.static_range(2):
        mbarrier.init(q_ready.index(slot), 1)
        mbarrier.init(q_free.index(slot), GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), 1)
        mbarrier.init(k_free.index(stage), GROUPS)
        mbarrier.init(v_ready.index(stage), 1)
        mbarrier.init(v_free.index(stage), GROUPS)
    fence_async_shared()
    bars = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, out, q_tiles, k_tiles, v_tiles, told, bars, num_items, KV_HEADS, GROUP,
                    SCALE * LOG2E, CAUSAL, WINDOW, PAGE,
                ),
            ),
            (
                _consume,
                (
                    1, out, q_tiles, k_tiles, v_tiles, told, bars, num_items, KV_HEADS, GROUP,
                    SCALE * LOG2E, CAUSAL, WINDOW, PAGE,
                ),
            ),
            (
                _produce,
                (
                    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, told, bars, block_tables,
                    query_start, seq_lens, num_tokens, num_seqs, num_pages, table_width,
                    num_items, KV_HEADS, GROUP, CAUSAL, WINDOW, PAGE, BOTH_WAYS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
