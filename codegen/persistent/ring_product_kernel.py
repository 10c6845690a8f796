"""Products in a ring (ring_kernel.py): x when it is there, tiles of weights as they come."""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .ring_attention_kernel import _time
from .ring_loads_kernel import _mine
from .ring_polls import _values

NIBBLES = {
    code: f"{{ .reg .b32 a; {'shl' if code < 5 else 'shr'}.b32 a, $1, {abs(19 - 4 * code)};"
    " lop3.b32 $0, a, 0x00780000, 0x41800000, 0xea; }"
    for code in range(8)
}
"""Of each of a word's eight codes, the lowest first: 16 more than it, as a float32's bits."""
_NIBBLES = gl.constexpr(NIBBLES)


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
def _codes_of(values):
    """What codes of e4m3 stand for that are nearest to values, and the scale of all of them: NaN
    where a value is not finite, so that all products are.
    """
    sizes = gl.where(values != values, float("inf"), gl.abs(values))
    largest = gl.max(gl.max(sizes, 1), 0)
    scale = gl.div_rn(largest, 448.0)
    scale = gl.where(scale == 0.0, 1.0, scale)
    scale = gl.where(scale == float("inf"), float("nan"), scale)
    steps = gl.minimum(gl.maximum(_by_largest(values, scale), -448.0), 448.0)
    return steps.to(gl.float8e4nv).to(gl.float32), scale


@gluon.jit
def _weight_row(r, row, N: gl.constexpr, R: gl.constexpr, GATED: gl.constexpr):
    """Rows of the weight that rows ``r`` of the tile at ``row`` are."""
    if GATED:
        return gl.where(r < R // 2, row // 2 + r, (N - R + row) // 2 + r)
    return row + r


@gluon.jit
def _nibble(w, CODE: gl.constexpr):
    """16 more than a code of 4 bits: its bits, brought to where those of 16 leave off."""
    TEXT: gl.constexpr = _NIBBLES[CODE]
    bits = gl.inline_asm_elementwise(TEXT, "=r,r", [w], dtype=gl.int32, is_pure=True, pack=1)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _of_nibbles(w, x0, x1, x2, x3, x4, x5, x6, x7):
    """Of words [R, V, W], the products of their codes, each 16 more, with what each meets."""
    terms = _nibble(w, 0) * x0[None, :, :]
    terms += _nibble(w, 1) * x1[None, :, :]
    terms += _nibble(w, 2) * x2[None, :, :]
    terms += _nibble(w, 3) * x3[None, :, :]
    terms += _nibble(w, 4) * x4[None, :, :]
    terms += _nibble(w, 5) * x5[None, :, :]
    terms += _nibble(w, 6) * x6[None, :, :]
    terms += _nibble(w, 7) * x7[None, :, :]
    return terms


@gluon.jit
def _eighths(x, columns: gl.constexpr):
    """x [V, 8 W] as what meets each of the eight codes of words [V, W], the first in their lowest
    bits.
    """
    V: gl.constexpr = x.shape[0]
    W: gl.constexpr = x.shape[1] // 8
    even, odd = gl.split(gl.reshape(x, [V, W, 2, 2, 2]))
    x04, x26 = gl.split(even)
    x15, x37 = gl.split(odd)
    x0, x4 = gl.split(x04)
    x2, x6 = gl.split(x26)
    x1, x5 = gl.split(x15)
    x3, x7 = gl.split(x37)
    return (
        gl.convert_layout(x0, columns),
        gl.convert_layout(x1, columns),
        gl.convert_layout(x2, columns),
        gl.convert_layout(x3, columns),
        gl.convert_layout(x4, columns),
        gl.convert_layout(x5, columns),
        gl.convert_layout(x6, columns),
        gl.convert_layout(x7, columns),
    )


@gluon.jit
def _fours(x, layout: gl.constexpr):
    """Sums of four that follow each other along the last of three axes."""
    A: gl.constexpr = x.shape[0]
    B: gl.constexpr = x.shape[1]
    C: gl.constexpr = x.shape[2] // 4
    return gl.convert_layout(gl.sum(gl.reshape(x, [A, B, C, 4]), 3), layout)


@gluon.jit
def _write(
    sums, added, out, row, R: gl.constexpr, GATED: gl.constexpr, ADDED: gl.constexpr,
    STEPWISE: gl.constexpr,
):  # fmt: skip
    """What is made of a tile's sums [R]."""
    r = gl.arange(0, R, layout=sums.type.layout)
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(sums, [2, R // 2]), (1, 0)))
        gate, up = _rounded(gate), _rounded(up)
        gate = gate / (1.0 + gl.exp(-gate))
        if STEPWISE:
            gate = _rounded(gate)
        half_r = gl.arange(0, R // 2, layout=gate.type.layout)
        gl.store(out + row // 2 + half_r, (gate * up).to(gl.bfloat16))
    elif ADDED:
        gl.store(out + row + r, (_rounded(sums) + added.to(gl.float32)).to(gl.bfloat16))
    else:
        gl.store(out + row + r, sums.to(gl.bfloat16))


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
    ROUNDS: gl.constexpr,
    TIMED: gl.constexpr,
):
    """The program's tiles, [R, K] of weights each, of a product whose first tile is ``begin``: x
    [K] times them, or what ``old`` is added to, or, where a tile has rows of the first half of
    the weights and as many of the second, gates times products. Returns where it ends.

    Weights are bfloat16, or codes of 8 bits with a scale of each row behind ``by``, or codes of 4
    bits with one of GROUP columns each.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = ring.shape[0]
    R: gl.constexpr = ring.shape[1] * ring.shape[2] * 16 // BITS // P
    TILES: gl.constexpr = N // R
    ALONG: gl.constexpr = max(WARPS // R, min(WARPS, P // 2048), 1)
    E: gl.constexpr = 128 // BITS  # weights of 16 bytes
    V: gl.constexpr = P // (32 * E * ALONG)  # times 16 bytes that a thread has of a row
    gl.static_assert(N % R == 0, "a product divides into whole tiles")
    numbers: gl.constexpr = gl.BlockedLayout(
        [1, V, E], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    words: gl.constexpr = gl.BlockedLayout(
        [1, V, 4], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    vectors: gl.constexpr = gl.BlockedLayout(
        [1, V, 1], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    summed: gl.constexpr = vectors if BITS == 4 else numbers
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, summed))
    KIND: gl.constexpr = gl.int32 if BITS == 4 else gl.float8e4nv if BITS == 8 else gl.bfloat16
    weights = ring._reinterpret(
        KIND, [SLOTS, R, V, P // V // (8 if BITS == 4 else 1)],
        gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]),
    )  # fmt: skip
    first, end = _mine(begin, TILES)
    _time(timeline, call, 0, TIMED)
    if first < end:
        r = gl.arange(0, R, layout=rows)
        row = (gl.program_id(0) + first * gl.num_programs(0) - begin) * R
        if BITS == 8:
            scales = gl.load(by + _weight_row(r, row, N, R, GATED))
        if BITS == 4:
            r3 = gl.arange(0, R, layout=gl.SliceLayout(1, gl.SliceLayout(2, vectors)))
            v3 = gl.arange(0, V, layout=gl.SliceLayout(0, gl.SliceLayout(2, vectors)))
            c3 = gl.arange(0, 32 * ALONG, layout=gl.SliceLayout(0, gl.SliceLayout(1, vectors)))
            vector = v3[None, :, None] * (32 * ALONG) + c3[None, None, :]
            in_row = vector < K // 32
            group = gl.where(in_row, vector // (GROUP // 32), 0)
            of = _weight_row(r3, row, N, R, GATED) * (K // GROUP)
            scales = gl.load(by + of[:, None, None] + group)
        values = _input(x, norm, diagnosis, call, limit, V, K, P, NORMED, EPS)
        if ROUNDS:
            values, step = _codes_of(values)
        values = gl.convert_layout(values.to(gl.bfloat16), gl.SliceLayout(0, numbers))
        values = values.to(gl.float32)
        if BITS == 4:
            x0, x1, x2, x3, x4, x5, x6, x7 = _eighths(values, gl.SliceLayout(0, words))
            own = gl.expand_dims(((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7)), 0)
            own = 24.0 * _fours(own, vectors)
        _time(timeline, call, 1, TIMED)
        for item in range(first, end):
            slot = item % SLOTS
            row = (gl.program_id(0) + item * gl.num_programs(0) - begin) * R
            added = 0.0
            if ADDED:
                added = gl.load(old + row + r, volatile=True)
            if BITS < 16:
                scale = scales.to(gl.float32)
                # Those of the next tile: they come from memory, as its weights do.
                later = gl.minimum(item + 1, end - 1)
                later = (gl.program_id(0) + later * gl.num_programs(0) - begin) * R
                if BITS == 8:
                    scales = gl.load(by + _weight_row(r, later, N, R, GATED))
                else:
                    of = _weight_row(r3, later, N, R, GATED) * (K // GROUP)
                    scales = gl.load(by + of[:, None, None] + group)
            for half in gl.static_range(2):
                mbarrier.wait(ready.index(slot * 2 + half), (item // SLOTS) & 1)
            w = weights.index(slot).load(words if BITS == 4 else numbers)
            tl.debug_barrier()  # all have read the slot
            mbarrier.arrive(free.index(slot))
            if BITS == 4:
                terms = _of_nibbles(w, x0, x1, x2, x3, x4, x5, x6, x7)
                terms = (_fours(terms, vectors) - own) * scale
            else:
                terms = w.to(gl.float32) * values[None, :, :]
            sums = gl.sum(gl.sum(terms, 1), 1)
            if ROUNDS:
                sums = sums * step
            if BITS == 8:
                sums = sums * scale
            _write(sums, added, out, row, R, GATED, ADDED, STEPWISE)
    _time(timeline, call, 2, TIMED)
    return begin + TILES
