"""The device side of prefill attention on Hopper: items of work, and the warp that brings their
queries, keys and values by TMA.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _item_sequence(query_start, num_seqs, block, BLOCK_Q: gl.constexpr):
    """The sequence that a block of rows belongs to, as in paged_attention_kernel.py."""
    # Each warp counts all starts, so that none waits for another.
    lanes: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    count = 0
    for first in range(0, num_seqs + 1, 128):
        index = first + gl.arange(0, 128, layout=lanes)
        known = index <= num_seqs
        starts = gl.load(query_start + index, mask=known, other=0).to(gl.int32)
        begun = known & (starts // BLOCK_Q + index + 1 <= block)
        count += gl.sum(begun.to(gl.int32), 0)
    return count - 1


@gluon.jit
def _work(
    turn,
    query_start,
    seq_lens,
    num_tokens,
    num_seqs,
    num_items,
    KV_HEADS: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOTH_WAYS: gl.constexpr,
):
    """What a program's next item of work is: its sequence, KV head, first token, the sequence's
    last token + 1, the position of token 0, the first key and the last one + 1, and the number of
    tiles that these lie in. An item without tokens has no tiles. Items of many keys come first.
    Rows before the first sequence are -1's, rows behind the last one B's: they see no key.
    """
    # Every second round goes backwards, so that long and short items add up; and every second
    # program goes from the last round to the first, so that items that wait for memory, of one
    # token each, run beside those that multiply.
    width = gl.num_programs(0)
    within = gl.program_id(0)
    rounds = gl.cdiv(num_items, width)
    if BOTH_WAYS:
        turn = gl.where(within % 2 == 0, turn, rounds - 1 - turn)
    item = turn * width + gl.where(turn % 2 == 0, within, width - 1 - within)
    item = gl.minimum(item, num_items)
    block = num_items // KV_HEADS - 1 - item // KV_HEADS
    seq = _item_sequence(query_start, num_seqs, block, BLOCK_Q)
    start = gl.load(query_start + seq, mask=seq >= 0, other=0).to(gl.int32)
    stop = gl.load(query_start + seq + 1, mask=seq < num_seqs, other=num_tokens).to(gl.int32)
    length = gl.load(seq_lens + seq, mask=(seq >= 0) & (seq < num_seqs), other=0).to(gl.int32)
    start = gl.maximum(start, 0)
    stop = gl.minimum(stop, num_tokens)
    first_block = gl.where(seq >= 0, start // BLOCK_Q + seq + 1, 0)
    first_row = start + (block - first_block) * BLOCK_Q
    origin = length - stop

    high = length
    if CAUSAL:
        high = gl.minimum(high, origin + gl.minimum(first_row + BLOCK_Q, stop))
    high = gl.maximum(high, 0)
    low = 0
    if WINDOW > 0:
        low = gl.maximum(origin + first_row - (WINDOW - 1), 0)
    tiles = gl.maximum((high + BLOCK_N - 1) // BLOCK_N - low // BLOCK_N, 1)
    some = (first_row < stop) & (item < num_items)
    return seq, item % KV_HEADS, first_row, stop, origin, low, high, gl.where(some, tiles, 0)


@gluon.jit
def _tell(told, slot, work):
    """Puts an item of ``_work`` where the groups that multiply find it: two loads, one behind the
    other, and a count are half a tile's time, which the warp that loads has ahead of them.
    """
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for field in gl.static_range(len(work)):
        told.index(slot * len(work) + field).store(gl.full([1], work[field], gl.int32, one))


@gluon.jit
def _told(told, slot, field: gl.constexpr, FIELDS: gl.constexpr):
    """A field of the item in a slot."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(told.index(slot * FIELDS + field).load(one), 0)


@gluon.jit
def _bring(
    desc, table, key, low, last_key, num_pages, column, tiles, stage, ready, PAGE: gl.constexpr
):
    """Tile ``stage`` of tiles [., BLOCK_N, D] gets the rows from ``key`` on, a page at a time;
    halves of 64 columns lie behind each other.
    """
    half: gl.constexpr = desc.block_type.shape[1]
    HALVES: gl.constexpr = tiles.shape[2] // half
    PAGES: gl.constexpr = tiles.shape[1] // PAGE
    COUNT: gl.constexpr = tiles.shape[0] * HALVES * PAGES
    boxes = tiles._reinterpret(tiles.dtype, [COUNT, PAGE, half], desc.layout)
    for page in range(PAGES):
        # A page without keys that are seen is out of bounds, which TMA fills with zeros: what it
        # holds may be NaN, which no weight hides.
        first = key + page * PAGE
        known = (first < last_key) & (first + PAGE > low)
        number = gl.load(table + (key // PAGE + page), mask=known, other=num_pages).to(gl.int32)
        last = gl.where(known, num_pages - 1, num_pages)
        row = gl.minimum(gl.maximum(number, 0), last) * PAGE
        for part in gl.static_range(HALVES):
            box = boxes.index((stage * HALVES + part) * PAGES + page)
            tma.async_copy_global_to_shared(desc, [row, column + part * half], ready, box)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    q_tiles,
    k_tiles,
    v_tiles,
    told,
    bars,
    block_tables,
    query_start,
    seq_lens,
    num_tokens,
    num_seqs,
    num_pages,
    table_width,
    num_items,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    PAGE: gl.constexpr,
    BOTH_WAYS: gl.constexpr,
):
    q_ready, q_free, k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    HALF: gl.constexpr = q_desc.block_type.shape[2]
    TOKENS: gl.constexpr = q_desc.block_type.shape[0]
    HALVES: gl.constexpr = DIM // HALF
    GROUPS: gl.constexpr = 2
    COUNT: gl.constexpr = 2 * GROUPS * HALVES
    q_boxes = q_tiles._reinterpret(q_tiles.dtype, [COUNT, TOKENS, GROUP, HALF], q_desc.layout)
    met = 0
    for turn in range(gl.cdiv(num_items, gl.num_programs(0))):
        work = _work(
            turn, query_start, seq_lens, num_tokens, num_seqs, num_items, KV_HEADS,
            CAUSAL, WINDOW, GROUPS * TOKENS, BLOCK_N, BOTH_WAYS,
        )  # fmt: skip
        seq, kv_head, first_row, _stop, _origin, low, high, tiles = work
        slot = turn & 1
        mbarrier.wait(q_free.index(slot), ((turn >> 1) & 1) ^ 1)
        _tell(told, slot, work)
        if tiles == 0:
            mbarrier.arrive(q_ready.index(slot))
        else:
            mbarrier.expect(q_ready.index(slot), GROUPS * 64 * DIM * 2)
            for part in gl.static_range(GROUPS * HALVES):
                where = [
                    first_row + part // HALVES * TOKENS, kv_head * GROUP, part % HALVES * HALF,
                ]  # fmt: skip
                box = q_boxes.index(slot * GROUPS * HALVES + part)
                tma.async_copy_global_to_shared(q_desc, where, q_ready.index(slot), box)
            # Rows of tables are few enough for 32 bits.
            table = block_tables + seq * table_width
            last_key = gl.minimum(high, table_width * PAGE)
            for back in range(0, tiles):
                key = (low // BLOCK_N + tiles - 1 - back) * BLOCK_N
                stage = met % STAGES
                parity = ((met // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), parity)
                mbarrier.expect(k_ready.index(stage), BLOCK_N * DIM * 2)
                _bring(
                    k_desc, table, key, low, last_key, num_pages, kv_head * DIM, k_tiles, stage,
                    k_ready.index(stage), PAGE,
                )  # fmt: skip
                mbarrier.wait(v_free.index(stage), parity)
                mbarrier.expect(v_ready.index(stage), BLOCK_N * DIM * 2)
                _bring(
                    v_desc, table, key, low, last_key, num_pages, kv_head * DIM, v_tiles, stage,
                    v_ready.index(stage), PAGE,
                )  # fmt: skip
                met += 1
