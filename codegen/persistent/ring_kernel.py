"""The device side of a ring: a decode step in one launch, weights always on their way.

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

**Rows** of K weights have a pitch of P, the next power of two, in shared memory. What lies between
them is what the memory held, once numbers, and meets an x of zero.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .ring_attention_kernel import _attend, _time
from .ring_polls import _values

PLACE = "mov.u32 $0, %smid; // $1"
"""The multiprocessor."""
_PLACE = gl.constexpr(PLACE)


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
def _pointer(places, index):
    """A bf16 array whose address stands in a table, which is a multiple of 16."""
    return gl.multiple_of(gl.load(places + index).to(gl.pointer_type(gl.bfloat16)), 16)


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
    STEPWISE: gl.constexpr,
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
        values = _values(x + at, diagnosis, call, limit, COUNT).to(gl.float32)
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
                gate = gate / (1.0 + gl.exp(-gate))
                if STEPWISE:
                    gate = _rounded(gate)
                half_r = gl.arange(0, R // 2, layout=gate.type.layout)
                gl.store(out + row // 2 + half_r, (gate * up).to(gl.bfloat16))
            elif ADDED:
                result = _rounded(sums) + added.to(gl.float32)
                gl.store(out + row + r, result.to(gl.bfloat16))
            else:
                gl.store(out + row + r, sums.to(gl.bfloat16))
    _time(timeline, call, 2, TIMED)
    return begin + TILES


@gluon.jit
def _note_angles(angles, positions, inv_freq, D: gl.constexpr, WARPS: gl.constexpr):
    """Writes cos and sin of the newest token's position, the latter with the sign that the first
    half of a head takes it with, rounded as the graph rounds them.
    """
    lined: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    e = gl.arange(0, D, layout=gl.SliceLayout(0, lined))
    position = gl.load(positions).to(gl.float32)
    angle = position * gl.load(inv_freq + e % (D // 2))
    cos, sin = _rounded(gl.cos(angle)), _rounded(gl.sin(angle))
    angles.slice(0, 1).store(cos[None, :])
    angles.slice(1, 1).store(gl.where(e < D // 2, -sin, sin)[None, :])
    tl.debug_barrier()


@gluon.jit
def _consume(
    ring,
    ready,
    free,
    room,
    kept,
    angles,
    places,
    token_ids,
    positions,
    seq_lens,
    slot_mapping,
    tables,
    inv_freq,
    memory,
    partials,
    logits,
    times,
    homes,
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
    PAGE: gl.constexpr,
    P: gl.constexpr,
    P_ATTENDED: gl.constexpr,
    P_INNER: gl.constexpr,
    EPS: gl.constexpr,
    FACTOR: gl.constexpr,
    ROPE_STEPWISE: gl.constexpr,
    STEPWISE: gl.constexpr,
    KEYS: gl.constexpr,
    TIMED: gl.constexpr,
):
    """All calls of a step."""
    WARPS: gl.constexpr = gl.num_warps()
    ATTENDED: gl.constexpr = HEADS * D
    QKV: gl.constexpr = (HEADS + 2 * KV_HEADS) * D
    LAYER: gl.constexpr = QKV + ATTENDED + 2 * WIDTH + INNER
    WORDS: gl.constexpr = LAYERS * LAYER // 2  # of a set
    BLOCK: gl.constexpr = WARPS * 128
    turn = generation & 1
    used = memory + turn * (LAYERS * LAYER)
    empty = (memory + (1 - turn) * (LAYERS * LAYER)).to(gl.pointer_type(gl.int32))
    word = gl.arange(0, BLOCK, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    nothing = gl.full([BLOCK], -1, gl.int32, layout=word.type.layout)
    for at in range(gl.program_id(0) * BLOCK, WORDS, gl.num_programs(0) * BLOCK):
        gl.store(empty + at + word, nothing, mask=at + word < WORDS)
    _note_angles(angles, positions, inv_freq, D, WARPS)
    timeline = times + gl.program_id(0) * ((5 * LAYERS + 1) * 3)
    length = gl.load(seq_lens)
    slot = gl.load(slot_mapping)
    token = gl.maximum(gl.load(token_ids), 0)
    begin = 0
    call = 0
    h = _pointer(places, LAYERS * 8 + 2) + token * WIDTH
    for layer in range(LAYERS):
        place = places + layer * 8
        qkv = used + layer * LAYER
        attended = qkv + QKV
        middle = attended + ATTENDED
        gated = middle + WIDTH
        after = gated + INNER
        norm = _pointer(place, 4)
        other_norm = _pointer(place, 5)
        keys = _pointer(place, 6)
        values = _pointer(place, 7)
        begin = _product(
            ring, ready, free, h, norm, h, qkv, timeline, diagnosis, call, limit, begin, QKV,
            WIDTH, P, True, False, False, EPS, STEPWISE, TIMED,
        )  # fmt: skip
        _attend(
            qkv, attended, keys, values, tables, slot, length, angles, partials,
            generation * LAYERS + layer, room, kept, timeline, diagnosis, call + 1, limit,
            HEADS, KV_HEADS, D, PAGE, FACTOR, ROPE_STEPWISE, KEYS, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, attended, norm, h, middle, timeline, diagnosis, call + 2, limit,
            begin, WIDTH, ATTENDED, P_ATTENDED, False, False, True, EPS, STEPWISE, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, middle, other_norm, h, gated, timeline, diagnosis, call + 3, limit,
            begin, 2 * INNER, WIDTH, P, True, True, False, EPS, STEPWISE, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, gated, norm, middle, after, timeline, diagnosis, call + 4, limit,
            begin, WIDTH, INNER, P_INNER, False, False, True, EPS, STEPWISE, TIMED,
        )  # fmt: skip
        call += 5
        h = after
    _product(
        ring, ready, free, h, _pointer(places, LAYERS * 8 + 1), h, logits, timeline, diagnosis,
        call, limit, begin, VOCAB, WIDTH, P, True, False, False, EPS, STEPWISE, TIMED,
    )  # fmt: skip
    if TIMED:
        home = gl.inline_asm_elementwise(
            _PLACE, "=r,r", [call], dtype=gl.int32, is_pure=False, pack=1
        )
        gl.store(homes + gl.program_id(0), home)
    tl.debug_barrier()
    done = gl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if done + 1 == (generation + 1) * gl.num_programs(0):
        if gl.load(diagnosis, volatile=True) != 0:
            gl.store(logits, float("nan"))
        gl.store(counters, generation + 1)


@gluon.jit
def _bring_half(
    desc, boxes, bar, unit, to, K: gl.constexpr, P: gl.constexpr, UNIT: gl.constexpr,
    BOX: gl.constexpr, HALF: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Half a tile, whose weights begin at line ``unit``, into boxes from ``to`` on."""
    if K == P:
        mbarrier.expect(bar, HALF * UNIT * 2)
        for box in gl.static_range(HALF // BOX):
            tma.async_copy_global_to_shared(desc, [unit + box * BOX, 0], bar, boxes.index(to + box))
    elif HALF * UNIT >= P:  # whole rows
        mbarrier.expect(bar, HALF * UNIT // P * K * 2)
        for row in range(HALF * UNIT // P):
            for box in range(K // UNIT // BOX):
                place = boxes.index(to + row * (P // UNIT // BOX) + box)
                at = unit + row * (K // UNIT) + box * BOX
                tma.async_copy_global_to_shared(desc, [at, 0], bar, place)
    else:
        LINES: gl.constexpr = K // UNIT - HALF if SECOND else HALF
        mbarrier.expect(bar, LINES * UNIT * 2)
        for box in gl.static_range(LINES // BOX):
            tma.async_copy_global_to_shared(desc, [unit + box * BOX, 0], bar, boxes.index(to + box))


@gluon.jit
def _bring_product(
    desc, ring, ready, free, begin, place, N: gl.constexpr, K: gl.constexpr, P: gl.constexpr,
    GATED: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """The program's tiles of a product whose first line's number stands at ``place``, each half as
    soon as its slot is free and CAP halves before it are there. Returns where tiles end."""
    SLOTS: gl.constexpr = ring.shape[0]
    UNIT: gl.constexpr = ring.shape[2]
    R: gl.constexpr = ring.shape[1] * UNIT // P
    BOX: gl.constexpr = desc.block_type.shape[0]
    HALF: gl.constexpr = ring.shape[1] // 2
    ROW: gl.constexpr = K // UNIT
    boxes = ring._reinterpret(ring.dtype, [SLOTS * 2 * HALF // BOX, BOX, UNIT], desc.layout)
    first, end = _mine(begin, N // R)
    start = gl.load(place).to(gl.int32)
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
                unit = start + (half * (N // 2) + tile * (R // 2)) * ROW
            elif R > 1:
                unit = start + (tile * R + half * (R // 2)) * ROW
            else:
                unit = start + tile * ROW + half * HALF
            bar = ready.index(slot * 2 + half)
            to = (slot * 2 + half) * (HALF // BOX)
            _bring_half(desc, boxes, bar, unit, to, K, P, UNIT, BOX, HALF, half == 1)
    return begin + N // R


@gluon.jit
def _bring(
    desc, desc_attended, desc_inner, ring, ready, free, places, LAYERS: gl.constexpr,
    WIDTH: gl.constexpr, ATTENDED: gl.constexpr, QKV: gl.constexpr, INNER: gl.constexpr,
    VOCAB: gl.constexpr, P: gl.constexpr, P_ATTENDED: gl.constexpr, P_INNER: gl.constexpr,
    CAP: gl.constexpr,
):  # fmt: skip
    """All weights of a step."""
    begin = 0
    for layer in range(LAYERS):
        place = places + layer * 8
        begin = _bring_product(desc, ring, ready, free, begin, place, QKV, WIDTH, P, False, CAP)
        begin = _bring_product(
            desc_attended, ring, ready, free, begin, place + 1, WIDTH, ATTENDED, P_ATTENDED, False,
            CAP,
        )  # fmt: skip
        begin = _bring_product(
            desc, ring, ready, free, begin, place + 2, 2 * INNER, WIDTH, P, True, CAP
        )
        begin = _bring_product(
            desc_inner, ring, ready, free, begin, place + 3, WIDTH, INNER, P_INNER, False, CAP
        )
    _bring_product(desc, ring, ready, free, begin, places + LAYERS * 8, VOCAB, WIDTH, P, False, CAP)


@gluon.jit
def _ring_step(
    desc,
    desc_attended,
    desc_inner,
    places,
    token_ids,
    positions,
    seq_lens,
    slot_mapping,
    block_tables,
    inv_freq,
    memory,
    partials,
    logits,
    times,
    homes,
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
    PAGE: gl.constexpr,
    P: gl.constexpr,
    P_ATTENDED: gl.constexpr,
    P_INNER: gl.constexpr,
    EPS: gl.constexpr,
    FACTOR: gl.constexpr,
    ROPE_STEPWISE: gl.constexpr,
    STEPWISE: gl.constexpr,
    SLOTS: gl.constexpr,
    CAP: gl.constexpr,
    KEYS: gl.constexpr,
    TIMED: gl.constexpr,
):
    # desc, desc_attended, desc_inner: bf16 [lines, UNIT], memory from the first weight to the end
    # of the last one, in boxes of rows that multiply the stream, attention's result, the gated
    # product; places: i64 [LAYERS + 1, 8] (ring_decode.py); memory: bf16 [2, LAYERS, QKV +
    # ATTENDED + 2 * WIDTH + INNER]; partials: f32 [4, KV_HEADS, 16, 4 * D + 4]; logits: bf16
    # [VOCAB]; times: i32 [programs, calls, 3]; homes: i32 [programs]; counters: i32, generation and
    # done.
    UNIT: gl.constexpr = desc.block_type.shape[1]
    UNITS: gl.constexpr = 16384 // UNIT
    ATTENDED: gl.constexpr = HEADS * D
    QKV: gl.constexpr = (HEADS + 2 * KV_HEADS) * D
    ring = gl.allocate_shared_memory(desc.dtype, [SLOTS, UNITS, UNIT], desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    room = gl.allocate_shared_memory(gl.bfloat16, [8, D], plain)
    kept = gl.allocate_shared_memory(gl.bfloat16, [KEYS, D], plain)
    angles = gl.allocate_shared_memory(gl.float32, [2, D], plain)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(2 * slot), 1)
        mbarrier.init(ready.index(2 * slot + 1), 1)
        mbarrier.init(free.index(slot), 1)
    if P > WIDTH or P_ATTENDED > ATTENDED or P_INNER > INNER:
        # Of rows that leave gaps: what nobody brings there has to be numbers.
        blank: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
        zeros = gl.zeros([UNITS, UNIT], gl.bfloat16, layout=blank)
        for slot in gl.static_range(SLOTS):
            ring.index(slot).store(zeros)
    fence_async_shared()
    tl.debug_barrier()
    generation = gl.load(counters, volatile=True)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    ring, ready, free, room, kept, angles, places, token_ids, positions, seq_lens,
                    slot_mapping, block_tables, inv_freq, memory, partials, logits, times, homes,
                    counters, diagnosis, generation, limit, LAYERS, WIDTH, INNER, VOCAB, HEADS,
                    KV_HEADS, D, PAGE, P, P_ATTENDED, P_INNER, EPS, FACTOR, ROPE_STEPWISE,
                    STEPWISE, KEYS, TIMED,
                ),
            ),
            (
                _bring,
                (
                    desc, desc_attended, desc_inner, ring, ready, free, places, LAYERS, WIDTH,
                    ATTENDED, QKV, INNER, VOCAB, P, P_ATTENDED, P_INNER, CAP,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
