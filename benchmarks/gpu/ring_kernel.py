"""The device side of the trial of a ring: a decode step's products, weights always on their way.

A program stays on each multiprocessor. One of its warps brings tiles of weights by TMA into a ring
in shared memory and waits for nothing but a free slot; the other warps wait for what a product
depends on, read x, multiply. All products' tiles lie in one arena in the order in which they are
met, a tile a box: program p of G takes tiles p, p + G, p + 2 G, ..., whatever product they are of.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# One thread polls; once one of the launch has given up, which it says in diagnosis[0], so do all.
_POLL = gl.constexpr("""{
    .reg .pred idle, there, late, told;
    .reg .b32 lane, seen, gap, polls, low, flag;
    mov.u32 lane, %tid.x;
    and.b32 lane, lane, $4;
    setp.ne.u32 idle, lane, 0;
    mov.u32 polls, 0;
    @idle bra DONE;
POLL:
    ld.acquire.gpu.global.b32 seen, [$1];
    sub.s32 gap, seen, $2;
    setp.ge.s32 there, gap, 0;
    @there bra DONE;
    add.u32 polls, polls, 1;
    and.b32 low, polls, 255;
    setp.ne.u32 told, low, 0;
    @told bra POLL;
    ld.relaxed.gpu.global.b32 flag, [$3];
    setp.ne.u32 late, flag, 0;
    @late bra DONE;
    setp.lt.u32 late, polls, $5;
    @late bra POLL;
    st.relaxed.gpu.global.b32 [$3+4], $6;
    st.relaxed.gpu.global.b32 [$3+8], seen;
    st.relaxed.gpu.global.b32 [$3+12], $2;
    mov.u32 flag, 1;
    st.relaxed.gpu.global.b32 [$3], flag;
DONE:
    bar.warp.sync 0xffffffff;
    mov.u32 $0, polls;
}""")

_SPIN = gl.constexpr("""{
    .reg .pred more;
    .reg .b32 start, now;
    mov.u32 start, %clock;
SPIN:
    mov.u32 now, %clock;
    sub.u32 now, now, start;
    setp.lt.u32 more, now, $1;
    @more bra SPIN;
    mov.u32 $0, now;
}""")


@gluon.jit
def _rounded(x):
    """A float32 as bfloat16 has it."""
    return x.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _wait(counter, target, diagnosis, call, limit, ATOMIC: gl.constexpr):
    """Waits until a counter has reached its target, modulo 2^32, or the launch is given up. Behind
    it all threads of the partition see what was written before the counter was added to.
    """
    if ATOMIC:
        seen = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        polls = 0
        while (seen - target < 0) & (polls < limit):
            seen = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            polls += 1
            if polls % 256 == 0:
                polls = gl.where(gl.load(diagnosis, volatile=True) != 0, limit, polls)
        if seen - target < 0:
            gl.store(diagnosis + 1, call)
            gl.store(diagnosis + 2, seen)
            gl.store(diagnosis + 3, target)
            gl.atomic_xchg(diagnosis, 1, sem="relaxed", scope="gpu")
    else:
        gl.inline_asm_elementwise(
            _POLL, "=r,l,r,l,r,r,r",
            [counter, target, diagnosis, gl.num_warps() * 32 - 1, limit, call],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()  # gl.barrier since 3.7, gl.thread_barrier before; of this partition


@gluon.jit
def _arrive(counter):
    """Tells those who wait that all that this partition wrote is there."""
    tl.debug_barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def _normed(x, weight, K: gl.constexpr, EPS: gl.constexpr):
    """An RMS norm of x f32 [K], rounded where the model rounds."""
    scale = gl.rsqrt(gl.sum(x * x, 0) / K + EPS)
    return _rounded(_rounded(x * scale) * weight.to(gl.float32))


@gluon.jit
def _product(
    which: gl.constexpr,
    tiles,
    ready,
    free,
    x,
    norm,
    out,
    before,
    target,
    diagnosis,
    call,
    limit,
    begin,
    COUNT: gl.constexpr,
    R: gl.constexpr,
    K: gl.constexpr,
    NORMED: gl.constexpr,
    GATED: gl.constexpr,
    ADDED: gl.constexpr,
    EPS: gl.constexpr,
    GROUPS: gl.constexpr,
    WAITS: gl.constexpr,
    SHARED_X: gl.constexpr,
    ATOMIC: gl.constexpr,
):
    """This group's tiles, [R, K] of weights each, of the product whose first tile is ``begin``:
    x [K] times them, of a pair of rows the gated one, or what is added to ``out``.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = tiles.shape[0]
    # A thread holds 64 elements of x where there are as many rows as that leaves warps for.
    ALONG: gl.constexpr = max(WARPS // R, min(WARPS, K // 2048), 1)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS // ALONG, ALONG], [1, 0])
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    VIA: gl.constexpr = SHARED_X and K == 2048
    spread: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0]) if VIA else columns
    pairs: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    weights = tiles._reinterpret(
        tiles.dtype, [SLOTS, R, K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    programs = gl.num_programs(0)
    mine = gl.program_id(0)
    first = (begin + programs - 1 - mine) // programs
    end = (begin + COUNT + programs - 1 - mine) // programs
    first += (first + which) % GROUPS
    if first < end:
        r = gl.arange(0, R, layout=rows)
        k = gl.arange(0, K, layout=spread)
        # What does not depend on the product before is asked for before the wait: each group has
        # waited for the residual already (the host sees to that).
        row = (mine + first * programs - begin) * R
        if NORMED:
            scales = gl.load(norm + k)
        if ADDED:
            old = gl.load(out + row + r)
        if WAITS:
            _wait(before, target, diagnosis, call, limit, ATOMIC)
        values = gl.load(x + k).to(gl.float32)
        if NORMED:
            values = _normed(values, scales, K, EPS)
        if VIA:
            values = gl.convert_layout(values.to(gl.bfloat16), columns).to(gl.float32)
        for item in range(first, end, GROUPS):
            slot = item % SLOTS
            row = (mine + item * programs - begin) * R
            mbarrier.wait(ready.index(slot), (item // SLOTS) & 1)
            w = weights.index(slot).load(layout)
            tl.debug_barrier()  # all have read the slot
            mbarrier.arrive(free.index(slot))
            sums = gl.sum(w.to(gl.float32) * values[None, :], 1)
            if GATED:
                both = gl.convert_layout(gl.reshape(sums, [R // 2, 2]), pairs)
                gate, up = gl.split(both)
                gate, up = _rounded(gate), _rounded(up)
                result = _rounded(gate / (1.0 + gl.exp(-gate))) * up
                half = gl.arange(0, R // 2, layout=gl.SliceLayout(1, pairs))
                gl.store(out + row // 2 + half, result.to(out.dtype.element_ty))
            elif ADDED:
                result = _rounded(sums) + old.to(gl.float32)
                gl.store(out + row + r, result.to(out.dtype.element_ty))
                later = gl.minimum(row + GROUPS * programs * R, (COUNT - 1) * R)
                old = gl.load(out + later + r)
            else:
                gl.store(out + row + r, sums.to(out.dtype.element_ty))
        _arrive(before + 32)


@gluon.jit
def _attend(
    q, out, before, target, diagnosis, call, limit, cycles, WIDTH: gl.constexpr,
    WAITS: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Stands in for attention: a part of q is copied, after a time like attention's."""
    PIECES: gl.constexpr = 64
    PART: gl.constexpr = WIDTH // PIECES
    part: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if gl.program_id(0) < PIECES:
        at = gl.program_id(0) * PART + gl.arange(0, PART, layout=part)
        if WAITS:
            _wait(before, target, diagnosis, call, limit, ATOMIC)
        values = gl.load(q + at)
        gl.inline_asm_elementwise(_SPIN, "=r,r", [cycles], dtype=gl.int32, is_pure=False, pack=1)
        gl.store(out + at, values)
        _arrive(before + 32)


@gluon.jit
def _consume(
    which: gl.constexpr,
    tiles,
    ready,
    free,
    h,
    qkv,
    attended,
    gated,
    logits,
    norms,
    counters,
    diagnosis,
    generation,
    limit,
    cycles,
    LAYERS: gl.constexpr,
    WIDTH: gl.constexpr,
    QKV: gl.constexpr,
    INNER: gl.constexpr,
    VOCAB: gl.constexpr,
    EPS: gl.constexpr,
    GROUPS: gl.constexpr,
    ATTENTION: gl.constexpr,
    WAITS: gl.constexpr,
    SHARED_X: gl.constexpr,
    ATOMIC: gl.constexpr,
):
    """All products of a step, as one group of warps computes them."""
    TILE: gl.constexpr = tiles.shape[1] * tiles.shape[2]
    R: gl.constexpr = TILE // WIDTH
    R_DOWN: gl.constexpr = TILE // INNER
    QKV_TILES: gl.constexpr = QKV // R
    O_TILES: gl.constexpr = WIDTH // R
    UP_TILES: gl.constexpr = 2 * INNER // R
    DOWN_TILES: gl.constexpr = WIDTH // R_DOWN
    HEAD_TILES: gl.constexpr = VOCAB // R
    CALLS: gl.constexpr = 5 if ATTENTION else 4
    full = gl.num_programs(0) * GROUPS
    arrivals = generation + 1
    from_qkv = arrivals * gl.minimum(QKV_TILES, full)
    from_o = arrivals * gl.minimum(O_TILES, full)
    from_up = arrivals * gl.minimum(UP_TILES, full)
    from_down = arrivals * gl.minimum(DOWN_TILES, full)
    begin = 0
    call = 0
    for layer in range(LAYERS):
        before = counters + 32 + 32 * call
        norm = norms + layer * (2 * WIDTH)
        # Nobody ever adds to the counter that the first product of all waits for.
        _product(
            which, tiles, ready, free, h, norm, qkv, before, gl.where(layer == 0, 0, from_down),
            diagnosis, call, limit, begin, QKV_TILES, R, WIDTH, True, False, False, EPS, GROUPS,
            WAITS, SHARED_X, ATOMIC,
        )  # fmt: skip
        begin += QKV_TILES
        before += 32
        from_attention = from_qkv
        x = qkv
        if ATTENTION:
            if which == 0:
                _attend(
                    qkv, attended, before, from_qkv, diagnosis, call + 1, limit, cycles, WIDTH,
                    WAITS, ATOMIC,
                )  # fmt: skip
            before += 32
            from_attention = arrivals * 64
            x = attended
        _product(
            which, tiles, ready, free, x, norm, h, before, from_attention, diagnosis,
            call + CALLS - 3, limit, begin, O_TILES, R, WIDTH, False, False, True, EPS, GROUPS,
            WAITS, SHARED_X, ATOMIC,
        )  # fmt: skip
        begin += O_TILES
        before += 32
        _product(
            which, tiles, ready, free, h, norm + WIDTH, gated, before, from_o, diagnosis,
            call + CALLS - 2, limit, begin, UP_TILES, R, WIDTH, True, True, False, EPS, GROUPS,
            WAITS, SHARED_X, ATOMIC,
        )  # fmt: skip
        begin += UP_TILES
        before += 32
        _product(
            which, tiles, ready, free, gated, norm, h, before, from_up, diagnosis,
            call + CALLS - 1, limit, begin, DOWN_TILES, R_DOWN, INNER, False, False, True, EPS,
            GROUPS, WAITS, SHARED_X, ATOMIC,
        )  # fmt: skip
        begin += DOWN_TILES
        call += CALLS
    _product(
        which, tiles, ready, free, h, norms + LAYERS * (2 * WIDTH), logits,
        counters + 32 + 32 * call, from_down, diagnosis, call, limit, begin, HEAD_TILES, R, WIDTH,
        True, False, False, EPS, GROUPS, WAITS, SHARED_X, ATOMIC,
    )  # fmt: skip
    tl.debug_barrier()
    done = gl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if done + 1 == arrivals * full:
        if gl.load(diagnosis, volatile=True) != 0:
            gl.store(logits, float("nan"))
        gl.store(counters, arrivals)


@gluon.jit
def _bring(desc, tiles, ready, free, count):
    """The program's tiles, each as soon as its slot is free."""
    SLOTS: gl.constexpr = tiles.shape[0]
    ROWS: gl.constexpr = tiles.shape[1]
    programs = gl.num_programs(0)
    mine = gl.program_id(0)
    for item in range((count + programs - 1 - mine) // programs):
        slot = item % SLOTS
        mbarrier.wait(free.index(slot), ((item // SLOTS) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), ROWS * tiles.shape[2] * 2)
        where = [(mine + item * programs) * ROWS, 0]
        tma.async_copy_global_to_shared(desc, where, ready.index(slot), tiles.index(slot))


@gluon.jit
def _ring_step(
    desc,
    h,
    qkv,
    attended,
    gated,
    logits,
    norms,
    counters,
    diagnosis,
    limit,
    cycles,
    count,
    LAYERS: gl.constexpr,
    WIDTH: gl.constexpr,
    QKV: gl.constexpr,
    INNER: gl.constexpr,
    VOCAB: gl.constexpr,
    EPS: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUPS: gl.constexpr,
    ATTENTION: gl.constexpr,
    WAITS: gl.constexpr,
    SHARED_X: gl.constexpr,
    ATOMIC: gl.constexpr,
):
    # desc: bf16 [count * ROWS, 256] in boxes [ROWS, 256]; h: bf16 [WIDTH], in place; qkv: bf16
    # [QKV]; attended: bf16 [WIDTH]; gated: bf16 [INNER]; logits: f32 [VOCAB]; norms: bf16
    # [2 * LAYERS + 1, WIDTH]; counters: i32, generation, done, and one every 32 from 32 on
    ROWS: gl.constexpr = desc.block_type.shape[0]
    tiles = gl.allocate_shared_memory(desc.dtype, [SLOTS, ROWS, 256], desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bar)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), 1)
        mbarrier.init(free.index(slot), 1)
    fence_async_shared()
    generation = gl.load(counters, volatile=True)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0, tiles, ready, free, h, qkv, attended, gated, logits, norms, counters,
                        diagnosis, generation, limit, cycles, LAYERS, WIDTH, QKV, INNER, VOCAB,
                        EPS, GROUPS, ATTENTION, WAITS, SHARED_X, ATOMIC,
                    ),
                ),
                (_bring, (desc, tiles, ready, free, count)),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0, tiles, ready, free, h, qkv, attended, gated, logits, norms, counters,
                        diagnosis, generation, limit, cycles, LAYERS, WIDTH, QKV, INNER, VOCAB,
                        EPS, GROUPS, ATTENTION, WAITS, SHARED_X, ATOMIC,
                    ),
                ),
                (
                    _consume,
                    (
                        1, tiles, ready, free, h, qkv, attended, gated, logits, norms, counters,
                        diagnosis, generation, limit, cycles, LAYERS, WIDTH, QKV, INNER, VOCAB,
                        EPS, GROUPS, ATTENTION, WAITS, SHARED_X, ATOMIC,
                    ),
                ),
                (_bring, (desc, tiles, ready, free, count)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
