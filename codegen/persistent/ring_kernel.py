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
them is zeros, or what other rows have left there, which are numbers in whatever kind reads them
(ring.py refuses sizes where they would not be), and meets an x of zero.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ring_attention_kernel import _attend
from .ring_loads_kernel import _bring
from .ring_product_kernel import _product, _rounded

PLACE = "mov.u32 $0, %smid; // $1"
"""The multiprocessor."""
_PLACE = gl.constexpr(PLACE)


@gluon.jit
def _pointer(places, index, KIND: gl.constexpr):
    """An array whose address stands in a table, which is a multiple of 16."""
    return gl.multiple_of(gl.load(places + index).to(gl.pointer_type(KIND)), 16)


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
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALE: gl.constexpr,
    TIMED: gl.constexpr,
):
    """All calls of a step."""
    WARPS: gl.constexpr = gl.num_warps()
    ATTENDED: gl.constexpr = HEADS * D
    QKV: gl.constexpr = (HEADS + 2 * KV_HEADS) * D
    LAYER: gl.constexpr = QKV + ATTENDED + 2 * WIDTH + INNER
    WORDS: gl.constexpr = LAYERS * LAYER // 2  # of a set
    BLOCK: gl.constexpr = WARPS * 128
    BY: gl.constexpr = gl.float32 if SCALE == 4 else gl.bfloat16
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
    h = _pointer(places, LAYERS * 12 + 2, gl.bfloat16) + token * WIDTH
    for layer in range(LAYERS):
        place = places + layer * 12
        qkv = used + layer * LAYER
        attended = qkv + QKV
        middle = attended + ATTENDED
        gated = middle + WIDTH
        after = gated + INNER
        norm = _pointer(place, 4, gl.bfloat16)
        other_norm = _pointer(place, 5, gl.bfloat16)
        keys = _pointer(place, 6, gl.bfloat16)
        values = _pointer(place, 7, gl.bfloat16)
        by_qkv = _pointer(place, 8, BY)
        by_output = _pointer(place, 9, BY)
        by_gates = _pointer(place, 10, BY)
        by_down = _pointer(place, 11, BY)
        begin = _product(
            ring, ready, free, h, norm, h, qkv, by_qkv, timeline, diagnosis, call, limit, begin,
            QKV, WIDTH, P, True, False, False, EPS, STEPWISE, BITS, GROUP, TIMED,
        )  # fmt: skip
        _attend(
            qkv, attended, keys, values, tables, slot, length, angles, partials,
            generation * LAYERS + layer, room, kept, timeline, diagnosis, call + 1, limit,
            HEADS, KV_HEADS, D, PAGE, FACTOR, ROPE_STEPWISE, KEYS, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, attended, norm, h, middle, by_output, timeline, diagnosis, call + 2,
            limit, begin, WIDTH, ATTENDED, P_ATTENDED, False, False, True, EPS, STEPWISE, BITS,
            GROUP, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, middle, other_norm, h, gated, by_gates, timeline, diagnosis,
            call + 3, limit, begin, 2 * INNER, WIDTH, P, True, True, False, EPS, STEPWISE, BITS,
            GROUP, TIMED,
        )  # fmt: skip
        begin = _product(
            ring, ready, free, gated, norm, middle, after, by_down, timeline, diagnosis, call + 4,
            limit, begin, WIDTH, INNER, P_INNER, False, False, True, EPS, STEPWISE, BITS, GROUP,
            TIMED,
        )  # fmt: skip
        call += 5
        h = after
    last = _pointer(places, LAYERS * 12 + 1, gl.bfloat16)
    _product(
        ring, ready, free, h, last, h, logits, h, timeline, diagnosis, call, limit, begin, VOCAB,
        WIDTH, P, True, False, False, EPS, STEPWISE, 16, 0, TIMED,
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
def _ring_step(
    desc,
    desc_attended,
    desc_inner,
    desc_head,
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
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALE: gl.constexpr,
    TIMED: gl.constexpr,
):
    # desc, desc_attended, desc_inner, desc_head: bf16 [lines, UNIT], memory from the first weight
    # to the end of the last one, in boxes of rows of a layer that multiply the stream, attention's
    # result and the gated product, and of rows of the last product; places: i64 [LAYERS + 1, 12]
    # (ring_decode.py); BITS: of weights of layers, whose scales have SCALE bytes; memory: bf16 [2,
    # LAYERS, QKV + ATTENDED + 2 * WIDTH + INNER]; partials: f32 [4, KV_HEADS, 16, 4 * D + 4];
    # logits: bf16 [VOCAB]; times: i32 [programs, calls, 3]; homes: i32 [programs]; counters: i32,
    # generation and done.
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
                    STEPWISE, KEYS, BITS, GROUP, SCALE, TIMED,
                ),
            ),
            (
                _bring,
                (
                    desc, desc_attended, desc_inner, desc_head, ring, ready, free, places, LAYERS,
                    WIDTH, ATTENDED, QKV, INNER, VOCAB, P, P_ATTENDED, P_INNER, CAP, BITS,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
