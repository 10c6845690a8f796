"""Products in a ring (ring_kernel.py): x when it is there, tiles of weights as they come, by tensor
cores (ring_mma_kernel.py), whose two rows are one of each half of a tile: of gates, a gate and what
it multiplies.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .ring_attention_kernel import _time
from .ring_loads_kernel import _mine
from .ring_mma_kernel import (
    _bytes_times,
    _codes_times,
    _eights,
    _fours,
    _numbers_times,
    _pairs,
    _row_times,
    _two_sums,
)
from .ring_polls import _values


@gluon.jit
def _rounded(x):
    """A float32 as bfloat16 has it."""
    return x.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _input(
    x, norm, diagnosis, call, limit, V: gl.constexpr, K: gl.constexpr, P: gl.constexpr,
    NORMED: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """x f32 [V, P / V] of a product, zeros behind K, when it is there: numbers of bfloat16."""
    WARPS: gl.constexpr = gl.num_warps()
    spread: gl.constexpr = gl.BlockedLayout(
        [1, 8], [1, 32], [min(WARPS, V), WARPS // min(WARPS, V)], [1, 0]
    )
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
    return values


@gluon.jit
def _by_largest(a, b):
    """a / b rounded to nearest, where b is at least the largest |a| over 448 (functions.py)."""
    up = gl.where(b < 8.271806125530277e-25, 1.2676506002282294e30, 1.0)  # 2^-80, 2^100
    b = b * up
    inverse = gl.div_rn(1.0, b)
    less = gl.where(b == float("inf"), 0.0, b) * -1.0
    a = a * up
    result = a * inverse
    for _ in gl.static_range(2):
        result = gl.fma(gl.fma(result, less, a), inverse, result)
    return result


@gluon.jit
def _in_steps(values):
    """Values in units of a scale, within the range of e4m3, and the scale of all of them: NaN where
    a value is not finite, so that all products are.
    """
    sizes = gl.where(values != values, float("inf"), gl.abs(values))
    largest = gl.max(gl.max(sizes, 1), 0)
    scale = gl.div_rn(largest, 448.0)
    scale = gl.where(scale == 0.0, 1.0, scale)
    scale = gl.where(scale == float("inf"), float("nan"), scale)
    return gl.minimum(gl.maximum(_by_largest(values, scale), -448.0), 448.0), scale


@gluon.jit
def _group_scales(
    by, row, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, vectors: gl.constexpr,
    H: gl.constexpr,
):  # fmt: skip
    """Scales [H, V, C] of what a thread has of rows from ``row`` on."""
    C: gl.constexpr = 32 * vectors.warps_per_cta[2]
    r = gl.arange(0, H, layout=gl.SliceLayout(1, gl.SliceLayout(2, vectors)))
    v = gl.arange(0, V, layout=gl.SliceLayout(0, gl.SliceLayout(2, vectors)))
    c = gl.arange(0, C, layout=gl.SliceLayout(0, gl.SliceLayout(1, vectors)))
    vector = v[None, :, None] * C + c[None, None, :]
    group = gl.where(vector < K // 32, vector // (GROUP // 32), 0)
    return gl.load(by + ((row + r) * (K // GROUP))[:, None, None] + group)


@gluon.jit
def _row_of(item, begin, half: gl.constexpr, N: gl.constexpr, R: gl.constexpr, GATED: gl.constexpr):
    """The first row of the weight that half of the program's tile ``item`` has."""
    row = (gl.program_id(0) + item * gl.num_programs(0) - begin) * R
    if GATED:
        return row // 2 + half * (N // 2)
    return row + half * (R // 2)


@gluon.jit
def _gated(gate, up, STEPWISE: gl.constexpr):
    """SiLU of the gate times the other."""
    gate, up = _rounded(gate), _rounded(up)
    gate = gate / (1.0 + gl.exp(-gate))
    if STEPWISE:
        gate = _rounded(gate)
    return gate * up


@gluon.jit
def _product(
    ring,
    ready,
    free,
    x,
    norm,
    old,
    out,
    by,
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
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    TIMED: gl.constexpr,
):
    """The program's tiles, [R, K] of weights each, of a product whose first tile is ``begin``: x
    [K] times them, or what ``old`` is added to, or, where a tile has rows of the first half of
    the weights and as many of the second, gates times products. Returns where it ends.

    Weights are bfloat16, or codes of 8 bits with a scale of each row behind ``by``, whose x is
    rounded to such too, or codes of 4 bits with a scale of GROUP columns each.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = ring.shape[0]
    R: gl.constexpr = ring.shape[1] * ring.shape[2] * 16 // BITS // P
    TILES: gl.constexpr = N // R
    HALVES: gl.constexpr = 2 if R > 1 else 1
    H: gl.constexpr = R // HALVES
    # Warps that share a row: so that x is in 64 words of each thread at most.
    ALONG: gl.constexpr = max(WARPS // H, min(WARPS, P // 4096), 1)
    E: gl.constexpr = 128 // BITS  # weights of 16 bytes
    V: gl.constexpr = P // (32 * E * ALONG)  # times 16 bytes that a thread has of a row
    W: gl.constexpr = 128 * ALONG
    OVER: gl.constexpr = WARPS // ALONG
    numbers: gl.constexpr = gl.BlockedLayout([1, V, E], [1, 1, 32], [OVER, 1, ALONG], [2, 1, 0])
    words: gl.constexpr = gl.BlockedLayout([1, V, 4], [1, 1, 32], [OVER, 1, ALONG], [2, 1, 0])
    vectors: gl.constexpr = gl.BlockedLayout([1, V, 1], [1, 1, 32], [OVER, 1, ALONG], [2, 1, 0])
    lanes: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [OVER, ALONG], [1, 0])
    columns: gl.constexpr = gl.SliceLayout(0, words)
    gl.static_assert(N % R == 0, "a product divides into whole tiles")
    gl.static_assert(HALVES == 2 or (BITS == 16 and not GATED), "a row of codes is half a tile")
    weights = ring._reinterpret(
        gl.int32, [SLOTS * HALVES, H, V, W], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    first, end = _mine(begin, TILES)
    _time(timeline, call, 0, TIMED)
    if first < end:
        r = gl.arange(0, H, layout=gl.SliceLayout(1, lanes))
        row_0 = _row_of(first, begin, 0, N, R, GATED)
        row_1 = _row_of(first, begin, 1, N, R, GATED)
        if BITS == 8:
            scale_0, scale_1 = gl.load(by + row_0 + r), gl.load(by + row_1 + r)
        if BITS == 4:
            scale_0 = _group_scales(by, row_0, GROUP, K, V, vectors, H)
            scale_1 = _group_scales(by, row_1, GROUP, K, V, vectors, H)
        values = _input(x, norm, diagnosis, call, limit, V, K, P, NORMED, EPS)
        if BITS == 8:
            values, step = _in_steps(values)
            low, high = _fours(values, columns)
        else:
            values = gl.convert_layout(values.to(gl.bfloat16), gl.SliceLayout(0, numbers))
        if BITS == 16:
            x_words = _pairs(values, columns)
        if BITS == 4:
            a, b, c, d = _eights(values, columns)
            eights = gl.full([1, V, W], -0x77777778, gl.int32, words)
            own, _ = _codes_times(eights, eights, a, b, c, d, vectors)
        _time(timeline, call, 1, TIMED)
        for item in range(first, end):
            slot = item % SLOTS
            phase = (item // SLOTS) & 1
            row_0 = _row_of(item, begin, 0, N, R, GATED)
            row_1 = _row_of(item, begin, 1, N, R, GATED)
            if ADDED:
                added_0 = gl.load(old + row_0 + r, volatile=True).to(gl.float32)
                added_1 = gl.load(old + row_1 + r, volatile=True).to(gl.float32)
            if BITS < 16:
                by_0, by_1 = scale_0.to(gl.float32), scale_1.to(gl.float32)
                # Those of the next tile: they come from memory, as its weights do.
                later = gl.minimum(item + 1, end - 1)
                later_0 = _row_of(later, begin, 0, N, R, GATED)
                later_1 = _row_of(later, begin, 1, N, R, GATED)
                if BITS == 8:
                    scale_0, scale_1 = gl.load(by + later_0 + r), gl.load(by + later_1 + r)
                else:
                    scale_0 = _group_scales(by, later_0, GROUP, K, V, vectors, H)
                    scale_1 = _group_scales(by, later_1, GROUP, K, V, vectors, H)
            for half in gl.static_range(2):
                mbarrier.wait(ready.index(slot * 2 + half), phase)
            one = weights.index(slot * HALVES).load(words)
            if HALVES == 2:
                other = weights.index(slot * 2 + 1).load(words)
            tl.debug_barrier()  # all have read the slot
            mbarrier.arrive(free.index(slot))
            if HALVES == 1:
                one = _row_times(one, x_words)
                other = one
            elif BITS == 16:
                one, other = _numbers_times(one, other, x_words)
            elif BITS == 8:
                one, other = _bytes_times(one, other, low, high)
            else:
                one, other = _codes_times(one, other, a, b, c, d, vectors)
                one = gl.sum((one - own) * by_0, 1)
                other = gl.sum((other - own) * by_1, 1)
            one, other = _two_sums(one, other, lanes)
            if BITS == 8:
                one, other = one * step * by_0, other * step * by_1
            if GATED:
                gl.store(out + row_0 + r, _gated(one, other, STEPWISE).to(gl.bfloat16))
            else:
                if ADDED:
                    one, other = _rounded(one) + added_0, _rounded(other) + added_1
                gl.store(out + row_0 + r, one.to(gl.bfloat16))
                if HALVES == 2:
                    gl.store(out + row_1 + r, other.to(gl.bfloat16))
    _time(timeline, call, 2, TIMED)
    return begin + TILES
