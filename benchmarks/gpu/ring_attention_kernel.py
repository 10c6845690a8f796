"""Attention in the trial of a ring (ring_kernel.py): a program has a split of a KV head's keys."""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from ring_polls import _part_values, _two_values
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_NOW = gl.constexpr("mov.u32 $0, %globaltimer_lo; // $1")


@gluon.jit
def _time(timeline, call, mark: gl.constexpr, TIMED: gl.constexpr):
    if TIMED:
        now = gl.inline_asm_elementwise(_NOW, "=r,r", [call], dtype=gl.int32, is_pure=False, pack=1)
        gl.store(timeline + call * 3 + mark, now)


@gluon.jit
def _attend(
    qkv,
    out,
    cache,
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
    KEYS: gl.constexpr,
    WAITS: gl.constexpr,
    TIMED: gl.constexpr,
):
    """Rope, the write into the cache, and attention to 16 * KEYS tokens, of which the newest is in
    qkv; then each of a KV head's 16 programs merges a sixteenth of its columns.
    """
    # cache: bf16 [2, 16 * KEYS, KV_HEADS, D], keys after rope; angles: f32 [2, D / 2]; partials:
    # f32 [4, KV_HEADS, 16, 4 * D + 4], results and their logarithms of sums, which layers use in
    # turn; room: bf16 [8, D] and kept: bf16 [KEYS, D] in shared memory
    WARPS: gl.constexpr = gl.num_warps()
    GROUP: gl.constexpr = HEADS // KV_HEADS
    CONTEXT: gl.constexpr = 16 * KEYS
    FACTOR: gl.constexpr = D**-0.5 * 1.4426950408889634
    LANES: gl.constexpr = D // 16
    gl.static_assert(GROUP <= 4, "a KV head has at most four query heads")
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
    lined: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    _time(timeline, call, 0, TIMED)
    if gl.program_id(0) < 16 * KV_HEADS:
        kv = gl.program_id(0) % KV_HEADS
        split = gl.program_id(0) // KV_HEADS
        n = split * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, keyed))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, keyed))
        cell = n[:, None] * (KV_HEADS * D) + kv * D + d[None, :]
        values = cache + CONTEXT * KV_HEADS * D
        k = gl.load(cache + cell)
        v = gl.load(values + cell)
        # A row each for query heads, of which some may come twice, then the key, then the value.
        line = gl.arange(0, 8, layout=gl.SliceLayout(1, lined))
        e = gl.arange(0, D, layout=gl.SliceLayout(0, lined))
        cos, sin = gl.load(angles + e % (D // 2)), gl.load(angles + D // 2 + e % (D // 2))
        head = kv * GROUP + gl.minimum(line, GROUP - 1)
        head = gl.where(line == 4, HEADS + kv, head)
        head = gl.where(line > 4, HEADS + KV_HEADS + kv, head)
        row = qkv + (head * D)[:, None]
        own, far = _two_values(
            row + e[None, :], row + ((e + D // 2) % D)[None, :], diagnosis, call, limit, WAITS
        )
        _time(timeline, call, 1, TIMED)
        sign = gl.where(e < D // 2, -1.0, 1.0)
        turned = own.to(gl.float32) * cos[None, :] + far.to(gl.float32) * (sign * sin)[None, :]
        room.store(gl.where((line < 5)[:, None], turned.to(gl.bfloat16), own))
        tl.debug_barrier()
        q = room.slice(0, 4).load(headed).to(gl.float32)
        if split == 15:
            newest = (n == CONTEXT - 1)[:, None]
            k = gl.where(newest, room.slice(4, 1).load(keyed), k)
            v = gl.where(newest, room.slice(5, 1).load(keyed), v)
            gl.store(cache + cell, k, mask=newest)
            gl.store(values + cell, v, mask=newest)
        kept.store(v)
        scores = gl.sum(gl.expand_dims(k.to(gl.float32), 0) * gl.expand_dims(q, 1), 2) * FACTOR
        scores = gl.convert_layout(scores, scored)
        top = gl.max(scores, 1)
        weights = gl.exp2(scores - gl.expand_dims(top, 1))
        total = gl.sum(weights, 1)
        rounded = gl.convert_layout(weights.to(gl.bfloat16), gl.SliceLayout(2, weighed))
        rows = kept.load(gl.SliceLayout(0, weighed)).to(gl.float32)
        products = gl.expand_dims(rounded.to(gl.float32), 2) * gl.expand_dims(rows, 0)
        sums = gl.sum(products, 1)
        heads: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
        share = gl.expand_dims(gl.convert_layout(1.0 / total, heads), 1)
        h = gl.arange(0, 4, layout=top.type.layout)
        wide_h = gl.arange(0, 4, layout=heads)
        c = gl.arange(0, D, layout=gl.SliceLayout(0, sums.type.layout))
        PART: gl.constexpr = 4 * D + 4
        SIZE: gl.constexpr = KV_HEADS * 16 * PART
        record = (kv * 16 + split) * PART
        sums_at = record + (wide_h * D)[:, None] + c[None, :]
        part = partials + (place & 3) * SIZE
        gl.store(part + record + 4 * D + h, top + gl.log2(total))
        gl.store(part + sums_at, sums * share)
        COLUMNS: gl.constexpr = 4 * D // 16
        flat: gl.constexpr = gl.BlockedLayout([1, 2], [16, 2], [1, WARPS], [1, 0])
        s = gl.arange(0, 16, layout=gl.SliceLayout(1, flat))
        column = split * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, flat))
        at = part + kv * (16 * PART) + (s * PART)[:, None]
        level_at = at + (4 * D + column // D)[None, :]
        found, levels = _part_values(at + column[None, :], level_at, diagnosis, call, limit, WAITS)
        decay = gl.exp2(levels - gl.max(levels, 0)[None, :])
        result = gl.sum(found * decay, 0) / gl.sum(decay, 0)
        to = out + kv * (GROUP * D) + column
        gl.store(to, result.to(gl.bfloat16), mask=column < GROUP * D)
        # Those of the layer before have been read by all, or qkv were not there.
        last = (partials + ((place - 1) & 3) * SIZE).to(gl.pointer_type(gl.int32))
        gl.store(last + record + 4 * D + h, gl.full([4], -1, gl.int32, layout=h.type.layout))
        gl.store(last + sums_at, gl.full([4, D], -1, gl.int32, layout=sums.type.layout))
    _time(timeline, call, 2, TIMED)
