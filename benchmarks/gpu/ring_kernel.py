"""The device side of the trial of a ring: a decode step in one launch, weights always on their way.

A program stays on each multiprocessor. One of its warps brings tiles of weights by TMA into a ring
in shared memory, with few bytes under way at once, since all other reads wait behind those; the
other warps read x, multiply, write. Program p of G takes tiles p, p + G, p + 2 G, ..., whatever
product they are of.

**Waits are for values.** What one program tells others it writes once a step, into memory that
held nothing before (ring_polls.py); who reads it looks at the values themselves until they are
there. So from a result to its reader there is one store and one load, where a counter takes a
store, a fence, an atomic, a poll and a load. There are two sets of that memory: a step uses one and
empties the other, whose readers were of the step before. What attention's programs tell each other
lies in four places which layers use in turn, and a program empties the last one when it has qkv:
they are made of all of the layer before.

**Rows** of K weights have a pitch of P, the next power of two, in shared memory: what TMA brings
behind a row is the beginning of the next one, and meets an x of zero.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from ring_attention_kernel import _attend, _time
from ring_polls import _values
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def _rounded(x):
    """A float32 as bfloat16 has it."""
    return x.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _mine(begin, count):
    """The program's tiles of the ``count`` from ``begin`` on, among all of its own."""
    programs = gl.num_programs(0)
    last = programs - 1 - gl.program_id(0)
    return (begin + last) // programs, (begin + count + last) // programs


@gluon.jit
def _product(
    ring,
    ready,
    free,
    x,
    norm,
    old,
    out,
    timeline,
    diagnosis,
    call,
    limit,
    begin,
    N: gl.constexpr,
    K: gl.constexpr,
    P: gl.constexpr,
    NORMED: gl.constexpr,
    GATED: gl.constexpr,
    ADDED: gl.constexpr,
    EPS: gl.constexpr,
    WAITS: gl.constexpr,
    TIMED: gl.constexpr,
):
    """The program's tiles, [R, K] of weights each, of a product whose first tile is ``begin``: x
    [K] times them, or what ``old`` is added to, or, where a tile has rows of the first half of
    the weights and as many of the second, gates times products. Returns where it ends.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = ring.shape[0]
    R: gl.constexpr = ring.shape[1] * ring.shape[2] // P
    TILES: gl.constexpr = N // R
    gl.static_assert(N % R == 0, "a product divides into whole tiles")
    ALONG: gl.constexpr = max(WARPS // R, min(WARPS, P // 2048), 1)
    V: gl.constexpr = P // (256 * ALONG)  # vectors of 8 that a thread has of a row
    layout: gl.constexpr = gl.BlockedLayout(
        [1, V, 8], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, layout))
    spread: gl.constexpr = gl.BlockedLayout(
        [1, 8], [1, 32], [min(WARPS, V), WARPS // min(WARPS, V)], [1, 0]
    )
    weights = ring._reinterpret(
        ring.dtype, [SLOTS, R, V, P // V], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    first, end = _mine(begin, TILES)
    _time(timeline, call, 0, TIMED)
    if first < end:
        r = gl.arange(0, R, layout=rows)
        k = gl.arange(0, V, layout=gl.SliceLayout(1, spread))[:, None] * (P // V)
        k += gl.arange(0, P // V, layout=gl.SliceLayout(0, spread))[None, :]
        at = k if K == P else gl.where(k < K, k, k - (P - K))
        if NORMED:
            scales = gl.load(norm + at)
        COUNT: gl.constexpr = max(P // (256 * WARPS), 1)
        values = _values(x + at, diagnosis, call, limit, COUNT, WAITS).to(gl.float32)
        if K < P:
            values = gl.where(k < K, values, 0.0)
        if NORMED:
            scale = gl.rsqrt(gl.sum(gl.sum(values * values, 1), 0) / K + EPS)
            values = _rounded(_rounded(values * scale) * scales.to(gl.float32))
        values = gl.convert_layout(values.to(gl.bfloat16), columns).to(gl.float32)
        _time(timeline, call, 1, TIMED)
        for item in range(first, end):
            slot = item % SLOTS
            row = (gl.program_id(0) + item * gl.num_programs(0) - begin) * R
            if ADDED:
                added = gl.load(old + row + r, volatile=True)
            for half in gl.static_range(2):
                mbarrier.wait(ready.index(slot * 2 + half), (item // SLOTS) & 1)
            w = weights.index(slot).load(layout)
            tl.debug_barrier()  # all have read the slot
            mbarrier.arrive(free.index(slot))
            sums = gl.sum(gl.sum(w.to(gl.float32) * values[None, :, :], 1), 1)
            if GATED:
                gate, up = gl.split(gl.permute(gl.reshape(sums, [2, R // 2]), (1, 0)))
                gate, up = _rounded(gate), _rounded(up)
                result = _rounded(gate / (1.0 + gl.exp(-gate))) * up
                half_r = gl.arange(0, R // 2, layout=result.type.layout)
                gl.store(out + row // 2 + half_r, result.to(out.dtype.element_ty))
            elif ADDED:
                result = _rounded(sums) + added.to(gl.float32)
                gl.store(out + row + r, result.to(out.dtype.element_ty))
            else:
                gl.store(out + row + r, sums.to(out.dtype.element_ty))
    _time(timeline, call, 2, TIMED)
    return begin + TILES


@gluon.jit
def _consume(
    ring,
    ready,
    free,
    room,
    kept,
    start,
    memory,
    partials,
    logits,
    norms,
    caches,
    angles,
    times,
    counters,
    diagnosis,
    generation,
    limit,
    LAYERS: gl.constexpr,
    WIDTH: gl.constexpr,
    INNER: gl.constexpr,
    VOCAB: gl.constexpr,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    P: gl.constexpr,
    P_INNER: gl.constexpr,
    EPS: gl.constexpr,
    KEYS: gl.constexpr,
    WAITS: gl.constexpr,
    TIMED: gl.constexpr,
):
    """All calls of a step."""
    QKV: gl.constexpr = (HEADS + 2 * KV_HEADS) * D
    CALLS: gl.constexpr = 5 if KEYS > 0 else 4
    LAYER: gl.constexpr = QKV + 3 * WIDTH + INNER
    WORDS: gl.constexpr = LAYERS * LAYER // 2  # of a set
    BLOCK: gl.constexpr = gl.num_warps() * 128
    gl.static_assert(HEADS * D == WIDTH)
    turn = generation & 1
    used = memory + turn * (LAYERS * LAYER)
    empty = (memory + (1 - turn) * (LAYERS * LAYER)).to(gl.pointer_type(gl.int32))
    word = gl.arange(0, BLOCK, layout=gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    nothing = gl.full([BLOCK], -1, gl.int32, layout=word.type.layout)
    for at in range(gl.program_id(0) * BLOCK, WORDS, gl.num_programs(0) * BLOCK):
        gl.store(empty + at + word, nothing, mask=at + word < WORDS)
    timeline = times + gl.program_id(0) * ((CALLS * LAYERS + 1) * 3)
    begin = 0
    call = 0
    h = start
    for layer in range(LAYERS):
        qkv = used + layer * LAYER
        attended = qkv + QKV
        middle = attended + WIDTH
        gated = middle + WIDTH
        after = gated + INNER
        norm = norms + layer * (2 * WIDTH)
        begin = _product(
            ring, ready, free, h, norm, h, qkv, timeline, diagnosis, call, limit, begin, QKV,
            WIDTH, P, True, False, False, EPS, WAITS, TIMED,
        )  # fmt: skip
        x = qkv
        if KEYS > 0:
            _attend(
                qkv, attended, caches + layer * (2 * 16 * KEYS * KV_HEADS * D), angles, partials,
                generation * LAYERS + layer, room, kept, timeline, diagnosis, call + 1, limit,
                HEADS, KV_HEADS, D, KEYS, WAITS, TIMED,
            )  # fmt: skip
            x = attended
        begin = _product(
            ring, ready, free, x, norm, h, middle, timeline, diagnosis, call + CALLS - 3, limit,
            begin, WIDTH, WIDTH, P, False, False, True, EPS, WAITS, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, middle, norm + WIDTH, h, gated, timeline, diagnosis,
            call + CALLS - 2, limit, begin, 2 * INNER, WIDTH, P, True, True, False, EPS, WAITS,
            TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, gated, norm, middle, after, timeline, diagnosis, call + CALLS - 1,
            limit, begin, WIDTH, INNER, P_INNER, False, False, True, EPS, WAITS, TIMED,
        )  # fmt: skip
        call += CALLS
        h = after
    _product(
        ring, ready, free, h, norms + LAYERS * (2 * WIDTH), h, logits, timeline, diagnosis, call,
        limit, begin, VOCAB, WIDTH, P, True, False, False, EPS, WAITS, TIMED,
    )  # fmt: skip
    tl.debug_barrier()
    done = gl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if done + 1 == (generation + 1) * gl.num_programs(0):
        if gl.load(diagnosis, volatile=True) != 0:
            gl.store(logits, float("nan"))
        gl.store(counters, generation + 1)


@gluon.jit
def _bring_product(
    desc, ring, ready, free, begin, unit, N: gl.constexpr, K: gl.constexpr, P: gl.constexpr,
    GATED: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """The program's tiles of a product whose weights begin at ``unit`` of the arena, each half as
    soon as its slot is free and CAP halves before it are there. Returns where tiles and weights
    end."""
    SLOTS: gl.constexpr = ring.shape[0]
    UNIT: gl.constexpr = ring.shape[2]
    R: gl.constexpr = ring.shape[1] * UNIT // P
    BOX: gl.constexpr = desc.block_type.shape[0]
    BOXES: gl.constexpr = ring.shape[1] // 2 // BOX  # of a half
    STEP: gl.constexpr = K // UNIT if R > 1 and K < P else BOX
    boxes = ring._reinterpret(ring.dtype, [SLOTS * 2 * BOXES, BOX, UNIT], desc.layout)
    first, end = _mine(begin, N // R)
    for item in range(first, end):
        slot = item % SLOTS
        tile = gl.program_id(0) + item * gl.num_programs(0) - begin
        mbarrier.wait(free.index(slot), ((item // SLOTS) & 1) ^ 1)
        for half in gl.static_range(2):
            number = item * 2 + half
            if number >= CAP:
                early = number - CAP
                mbarrier.wait(ready.index(early % (2 * SLOTS)), (early // (2 * SLOTS)) & 1)
            if GATED:
                at = unit + (half * (N // 2) + tile * (R // 2)) * (K // UNIT)
            elif R > 1:
                at = unit + (tile * R + half * (R // 2)) * (K // UNIT)
            else:
                at = unit + tile * (K // UNIT) + half * (P // UNIT // 2)
            bar = ready.index(slot * 2 + half)
            mbarrier.expect(bar, BOXES * BOX * UNIT * 2)
            for box in gl.static_range(BOXES):
                to = boxes.index((slot * 2 + half) * BOXES + box)
                tma.async_copy_global_to_shared(desc, [at + box * STEP, 0], bar, to)
    return begin + N // R, unit + N * (K // UNIT)


@gluon.jit
def _bring(
    desc, desc_inner, ring, ready, free, LAYERS: gl.constexpr, WIDTH: gl.constexpr,
    QKV: gl.constexpr, INNER: gl.constexpr, VOCAB: gl.constexpr, P: gl.constexpr,
    P_INNER: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """All weights of a step."""
    begin = 0
    unit = 0
    for _ in range(LAYERS):
        begin, unit = _bring_product(
            desc, ring, ready, free, begin, unit, QKV, WIDTH, P, False, CAP
        )
        begin, unit = _bring_product(
            desc, ring, ready, free, begin, unit, WIDTH, WIDTH, P, False, CAP
        )
        begin, unit = _bring_product(
            desc, ring, ready, free, begin, unit, 2 * INNER, WIDTH, P, True, CAP
        )
        begin, unit = _bring_product(
            desc_inner, ring, ready, free, begin, unit, WIDTH, INNER, P_INNER, False, CAP
        )
    _bring_product(desc, ring, ready, free, begin, unit, VOCAB, WIDTH, P, False, CAP)


@gluon.jit
def _ring_step(
    desc,
    desc_inner,
    start,
    memory,
    logits,
    norms,
    caches,
    angles,
    partials,
    times,
    counters,
    diagnosis,
    limit,
    LAYERS: gl.constexpr,
    WIDTH: gl.constexpr,
    INNER: gl.constexpr,
    VOCAB: gl.constexpr,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    P: gl.constexpr,
    P_INNER: gl.constexpr,
    EPS: gl.constexpr,
    SLOTS: gl.constexpr,
    UNITS: gl.constexpr,
    CAP: gl.constexpr,
    KEYS: gl.constexpr,
    WAITS: gl.constexpr,
    TIMED: gl.constexpr,
):
    # desc, desc_inner: bf16 [units of the arena, UNIT] in boxes of a half tile, or of a row where
    # rows of K weights lie closer than P; start: bf16 [WIDTH]; memory: bf16 [2, LAYERS, QKV + 3 *
    # WIDTH + INNER]; logits: f32 [VOCAB]; norms: bf16 [2 * LAYERS + 1, WIDTH]; caches: bf16
    # [LAYERS, 2, 16 * KEYS, KV_HEADS, D]; angles: f32 [2, D / 2]; partials: f32 [4, KV_HEADS, 16,
    # 4 * D + 4]; counters: i32, generation and done.
    UNIT: gl.constexpr = desc.block_type.shape[1]
    QKV: gl.constexpr = (HEADS + 2 * KV_HEADS) * D
    ring = gl.allocate_shared_memory(desc.dtype, [SLOTS, UNITS, UNIT], desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    room = gl.allocate_shared_memory(gl.bfloat16, [8, D], plain)
    kept = gl.allocate_shared_memory(gl.bfloat16, [max(KEYS, 1), D], plain)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(2 * slot), 1)
        mbarrier.init(ready.index(2 * slot + 1), 1)
        mbarrier.init(free.index(slot), 1)
    fence_async_shared()
    generation = gl.load(counters, volatile=True)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    ring, ready, free, room, kept, start, memory, partials, logits, norms, caches,
                    angles, times, counters, diagnosis, generation, limit, LAYERS, WIDTH, INNER,
                    VOCAB, HEADS, KV_HEADS, D, P, P_INNER, EPS, KEYS, WAITS, TIMED,
                ),
            ),
            (
                _bring,
                (
                    desc, desc_inner, ring, ready, free, LAYERS, WIDTH, QKV, INNER, VOCAB, P,
                    P_INNER, CAP,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
