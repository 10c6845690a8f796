"""The device side of the trial of a ring: a decode step's products, weights always on their way.

A program stays on each multiprocessor. One of its warps brings tiles of weights by TMA into a ring
in shared memory and waits for nothing but a free slot; the other warps wait for what a product
depends on, read x, multiply. All products' tiles lie in one arena in the order in which they are
met, a tile a box: program p of G takes tiles p, p + G, p + 2 G, ..., whatever product they are of.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from ring_attention_kernel import _arrive, _attend, _rounded, _stand_in, _wait
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


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
    caches,
    angles,
    partial,
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
    KEYS: gl.constexpr,
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
    CALLS: gl.constexpr = 5 if ATTENTION > 0 else 4
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
        if ATTENTION > 0:
            if which == 0:
                if ATTENTION == 1:
                    _stand_in(
                        qkv, attended, before, from_qkv, diagnosis, call + 1, limit, cycles, WIDTH,
                        WAITS, ATOMIC,
                    )  # fmt: skip
                else:
                    _attend(
                        qkv, attended, caches + layer * (2 * 8 * KEYS * 512), angles, partial,
                        counters + 32 * (5 * LAYERS + 4), before, from_qkv, diagnosis, call + 1,
                        limit, KEYS, WAITS, ATOMIC,
                    )  # fmt: skip
            before += 32
            from_attention = arrivals * (64 if ATTENTION == 1 else 8)
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
    caches,
    angles,
    partial,
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
    KEYS: gl.constexpr,
    WAITS: gl.constexpr,
    SHARED_X: gl.constexpr,
    ATOMIC: gl.constexpr,
):
    # desc: bf16 [count * ROWS, 256] in boxes [ROWS, 256]; h: bf16 [WIDTH], in place; qkv: bf16
    # [QKV]; attended: bf16 [WIDTH]; gated: bf16 [INNER]; logits: f32 [VOCAB]; norms: bf16
    # [2 * LAYERS + 1, WIDTH]; caches: bf16 [LAYERS, 2, 8 * KEYS, 8, 64]; counters: i32,
    # generation, done, and one every 32 from 32 on, then one every 32 for KV heads. ATTENTION is 0
    # for none, 1 for its stand-in, 2 for attention itself.
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
                        0, tiles, ready, free, h, qkv, attended, gated, logits, norms, caches,
                        angles, partial, counters, diagnosis, generation, limit, cycles, LAYERS,
                        WIDTH, QKV, INNER, VOCAB, EPS, GROUPS, ATTENTION, KEYS, WAITS, SHARED_X,
                        ATOMIC,
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
                        0, tiles, ready, free, h, qkv, attended, gated, logits, norms, caches,
                        angles, partial, counters, diagnosis, generation, limit, cycles, LAYERS,
                        WIDTH, QKV, INNER, VOCAB, EPS, GROUPS, ATTENTION, KEYS, WAITS, SHARED_X,
                        ATOMIC,
                    ),
                ),
                (
                    _consume,
                    (
                        1, tiles, ready, free, h, qkv, attended, gated, logits, norms, caches,
                        angles, partial, counters, diagnosis, generation, limit, cycles, LAYERS,
                        WIDTH, QKV, INNER, VOCAB, EPS, GROUPS, ATTENTION, KEYS, WAITS, SHARED_X,
                        ATOMIC,
                    ),
                ),
                (_bring, (desc, tiles, ready, free, count)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
