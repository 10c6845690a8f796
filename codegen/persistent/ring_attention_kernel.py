"""Attention in a ring (ring_kernel.py): a program has a split of a KV head's keys."""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .ring_polls import _part_values, _two_values

NOW = "mov.u32 $0, %globaltimer_lo; // $1"
"""The time in ns."""
_NOW = gl.constexpr(NOW)


@gluon.jit
def _time(timeline, call, mark: gl.constexpr, TIMED: gl.constexpr):
    if TIMED:
        now = gl.inline_asm_elementwise(_NOW, "=r,r", [call], dtype=gl.int32, is_pure=False, pack=1)
        gl.store(timeline + call * 3 + mark, now)


@gluon.jit
def _keys(keys, values, tables, n, d, end, ROW: gl.constexpr, PAGE: gl.constexpr):
    """Keys and values [KEYS, D] of tokens ``n`` in front of ``end``."""
    there = n < end
    page = gl.load(tables + n // PAGE, mask=there, other=0).to(gl.int64)
    cell = (page * PAGE + n % PAGE)[:, None] * ROW + d[None, :]
    k = gl.load(keys + cell, mask=there[:, None], other=0.0)
    v = gl.load(values + cell, mask=there[:, None], other=0.0)
    return k, v


@gluon.jit
def _turned(own, far, cos, sin, STEPWISE: gl.constexpr):
    """Rope: bf16 of numbers and of those half a head away, with the sign in sin."""
    straight, across = own.to(gl.float32) * cos, far.to(gl.float32) * sin
    if STEPWISE:
        straight = straight.to(gl.bfloat16).to(gl.float32)
        across = across.to(gl.bfloat16).to(gl.float32)
    return (straight + across).to(gl.bfloat16)


@gluon.jit
def _attend(
    qkv,
    out,
    keys,
    values,
    tables,
    slot,
    length,
    angles,
    partials,
    place,
    room,
    kept,
    timeline,
    diagnosis,
    call,
    limit,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    FACTOR: gl.constexpr,
    STEPWISE: gl.constexpr,
    KEYS: gl.constexpr,
    TIMED: gl.constexpr,
):
    """Rope, the write into the cache, and attention to ``length`` tokens, of which the newest is in
    qkv, by blocks of KEYS; then each of a KV head's 16 programs merges a sixteenth of its columns.
    """
    # keys, values: bf16 [pages, PAGE, KV_HEADS, D], keys after rope; tables: i32 [pages of the
    # sequence]; slot: of the newest; angles: f32 [2, D] in shared memory, cos and the sin with the
    # sign; partials: f32 [4, KV_HEADS, 16, 4 * D + 4], results and their logarithms of sums, which
    # layers use in turn; room: bf16 [8, D] and kept: bf16 [KEYS, D] in shared memory
    WARPS: gl.constexpr = gl.num_warps()
    GROUP: gl.constexpr = HEADS // KV_HEADS
    ROW: gl.constexpr = KV_HEADS * D
    LANES: gl.constexpr = D // 16
    deep: gl.constexpr = gl.BlockedLayout(
        [4, 1, 16], [1, 32 // LANES, LANES], [1, WARPS, 1], [2, 1, 0]
    )
    keyed: gl.constexpr = gl.SliceLayout(0, deep)
    headed: gl.constexpr = gl.SliceLayout(1, deep)
    # A warp has a head: a thread a key of it, then some columns of the result.
    scored: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    weighed: gl.constexpr = gl.BlockedLayout(
        [1, KEYS, D // 32], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0]
    )
    summed: gl.constexpr = gl.SliceLayout(1, weighed)
    heads: gl.constexpr = gl.SliceLayout(1, summed)
    lined: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    _time(timeline, call, 0, TIMED)
    if gl.program_id(0) < 16 * KV_HEADS:
        kv = gl.program_id(0) % KV_HEADS
        split = gl.program_id(0) // KV_HEADS
        share = (length + 16 * KEYS - 1) // (16 * KEYS) * KEYS
        first = split * share
        end = gl.minimum(first + share, length)
        i = gl.arange(0, KEYS, layout=gl.SliceLayout(1, keyed))
        d = kv * D + gl.arange(0, D, layout=gl.SliceLayout(0, keyed))
        next_k, next_v = _keys(keys, values, tables, first + i, d, end, ROW, PAGE)
        # A row each for query heads, of which some may come twice, then the key, then the value.
        line = gl.arange(0, 8, layout=gl.SliceLayout(1, lined))
        e = gl.arange(0, D, layout=gl.SliceLayout(0, lined))
        cos = angles.slice(0, 1).load(lined)
        sin = angles.slice(1, 1).load(lined)
        head = kv * GROUP + gl.minimum(line, GROUP - 1)
        head = gl.where(line == 4, HEADS + kv, head)
        head = gl.where(line > 4, HEADS + KV_HEADS + kv, head)
        row = qkv + (head * D)[:, None]
        own, far = _two_values(
            row + e[None, :], row + ((e + D // 2) % D)[None, :], diagnosis, call, limit
        )
        _time(timeline, call, 1, TIMED)
        turned = _turned(own, far, cos, sin, STEPWISE)
        room.store(gl.where((line < 5)[:, None], turned, own))
        tl.debug_barrier()
        q = room.slice(0, 4).load(headed).to(gl.float32)
        top = gl.full([4], float("-inf"), gl.float32, layout=gl.SliceLayout(1, scored))
        total = gl.zeros([4], gl.float32, layout=gl.SliceLayout(1, scored))
        sums = gl.zeros([4, D], gl.float32, layout=summed)
        for begin in range(first, end, KEYS):
            n = begin + i
            k, v = next_k, next_v
            next_k, next_v = _keys(keys, values, tables, n + KEYS, d, end, ROW, PAGE)
            if begin + KEYS >= length:
                newest = (n == length - 1)[:, None]
                k = gl.where(newest, room.slice(4, 1).load(keyed), k)
                v = gl.where(newest, room.slice(5, 1).load(keyed), v)
                to = slot * ROW + (d[None, :] + i[:, None] * 0)
                gl.store(keys + to, k, mask=newest)
                gl.store(values + to, v, mask=newest)
            tl.debug_barrier()  # all have read the block before
            kept.store(v)
            scores = gl.sum(gl.expand_dims(k.to(gl.float32), 0) * gl.expand_dims(q, 1), 2) * FACTOR
            scores = gl.convert_layout(scores, scored)
            key = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(0, scored))
            scores = gl.where((key < end)[None, :], scores, float("-inf"))
            higher = gl.maximum(top, gl.max(scores, 1))
            weights = gl.exp2(scores - gl.expand_dims(higher, 1))
            decay = gl.exp2(top - higher)
            total = total * decay + gl.sum(weights, 1)
            top = higher
            rounded = gl.convert_layout(weights.to(gl.bfloat16), gl.SliceLayout(2, weighed))
            tl.debug_barrier()
            rows = kept.load(gl.SliceLayout(0, weighed)).to(gl.float32)
            products = gl.expand_dims(rounded.to(gl.float32), 2) * gl.expand_dims(rows, 0)
            sums = sums * gl.expand_dims(gl.convert_layout(decay, heads), 1) + gl.sum(products, 1)
        some = total > 0.0
        level = gl.where(some, top + gl.log2(total), float("-inf"))
        scale = gl.where(some, 1.0 / total, 0.0)
        h = gl.arange(0, 4, layout=top.type.layout)
        wide_h = gl.arange(0, 4, layout=heads)
        c = gl.arange(0, D, layout=gl.SliceLayout(0, summed))
        PART: gl.constexpr = 4 * D + 4
        SIZE: gl.constexpr = KV_HEADS * 16 * PART
        record = (kv * 16 + split) * PART
        sums_at = record + (wide_h * D)[:, None] + c[None, :]
        part = partials + (place & 3) * SIZE
        gl.store(part + record + 4 * D + h, level)
        gl.store(part + sums_at, sums * gl.expand_dims(gl.convert_layout(scale, heads), 1))
        COLUMNS: gl.constexpr = 4 * D // 16
        flat: gl.constexpr = gl.BlockedLayout([1, 2], [16, 2], [1, WARPS], [1, 0])
        s = gl.arange(0, 16, layout=gl.SliceLayout(1, flat))
        column = split * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, flat))
        at = part + kv * (16 * PART) + (s * PART)[:, None]
        level_at = at + (4 * D + column // D)[None, :]
        found, levels = _part_values(at + column[None, :], level_at, diagnosis, call, limit)
        fading = gl.exp2(levels - gl.max(levels, 0)[None, :])
        result = gl.sum(found * fading, 0) / gl.sum(fading, 0)
        gl.store(out + kv * (GROUP * D) + column, result.to(gl.bfloat16), mask=column < GROUP * D)
        # Those of the layer before have been read by all, or qkv were not there.
        last = (partials + ((place - 1) & 3) * SIZE).to(gl.pointer_type(gl.int32))
        gl.store(last + record + 4 * D + h, gl.full([4], -1, gl.int32, layout=h.type.layout))
        gl.store(last + sums_at, gl.full([4, D], -1, gl.int32, layout=summed))
    _time(timeline, call, 2, TIMED)
