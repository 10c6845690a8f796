"""Products in a ring by tensor cores, without moving a byte: another ``_product`` than that of
ring_product_kernel.py, for the same tiles.

In an mma of m16n8k16 a lane gives k 2 t and 2 t + 8 of row g of A and of column g of B, where g is
lane / 4 and t lane % 4 (of e4m3, m16n8k32, twice as many of each). So if each lane puts its own
words of x into A and its own words of weights into B, the element (g, g) of the result is the dot
product of what the four lanes of group g have. Of the 16 x 8 elements these 8 are wanted, rows 8 to
15 are zeros: a sixteenth of the work, of which there is plenty, and no conversion of weights.

Element (g, g) lies in lane 4 g + g / 2, the first of its four results where g is even, the second
where it is odd.

Codes of 4 bits become bfloat16 by one mask for two of them: 0x4300 and a code n are 128 + n. What
that is too much is the same product with 136 in the place of weights. Four lanes have 128 codes in
a row, so that a scale belongs to whole groups of lanes.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .ring_attention_kernel import _time
from .ring_loads_kernel import _mine
from .ring_product_kernel import _codes_of, _eighths, _input, _rounded, _write

_SUMS = ", ".join(f"c{i}" for i in range(4))
_BEGIN = (
    "{ .reg .b32 z; .reg .f32 c<4>; mov.b32 z, 0; "
    + " ".join(f"mov.f32 c{i}, 0f00000000;" for i in range(4))
    + " .reg .b32 w<4>;"
)


def _mma(kind: str, x: tuple[str, str], w: tuple[str, str]) -> str:
    shape = {"bf16": "m16n8k16", "e4m3": "m16n8k32"}[kind]
    return (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{{_SUMS}}}, "
        f"{{{x[0]}, z, {x[1]}, z}}, {{{w[0]}, {w[1]}}}, {{{_SUMS}}};"
    )


def _end(outputs: int) -> str:
    """The four sums, and for the other outputs what adds nothing to them: assemblers know it."""
    lines = [f"mov.f32 ${i}, c{i};" for i in range(4)]
    lines += [f"mov.f32 ${i}, 0f80000000;" for i in range(4, outputs)]
    return " ".join((*lines, "}"))


def _of_words(kind: str, vectors: int) -> str:
    """Of so many times four words of weights and as many of x, the sums of all in the first four
    results.
    """
    count = 4 * vectors
    pairs = [
        _mma(
            kind,
            (f"${2 * count + i}", f"${2 * count + i + 1}"),
            (f"${count + i}", f"${count + i + 1}"),
        )
        for i in range(0, count, 2)
    ]
    return " ".join((_BEGIN, *pairs, _end(count)))


def _of_codes() -> str:
    """Of four words of 4-bit codes ($4 to $7), codes i and i + 4 of a word with what meets both,
    words of x from $(8 + 4 i) on.
    """
    lines = [_BEGIN]
    for word in range(4):
        for i in range(4):
            lines += [f"shr.b32 w{i}, ${4 + word}, {4 * i};"]
            lines += [f"lop3.b32 w{i}, w{i}, 0x000f000f, 0x43004300, 0xea;"]
        for i in (0, 2):
            x = (f"${8 + 4 * i + word}", f"${12 + 4 * i + word}")
            lines += [_mma("bf16", x, (f"w{i}", f"w{i + 1}"))]
    return " ".join((*lines, _end(4)))


_COUNTS = (1, 2, 4, 8, 16)
NUMBERS = {count: _of_words("bf16", count) for count in _COUNTS}
BYTES = {count: _of_words("e4m3", count) for count in _COUNTS}
"""PTX, by vectors of four words: of bfloat16, and of e4m3."""
WORDS_USED = {count: ",".join(["=f"] * 4 * count + ["r"] * 8 * count) for count in _COUNTS}
CODES = _of_codes()
CODES_USED = ",".join(["=f"] * 4 + ["r"] * 20)
_NUMBERS, _BYTES = gl.constexpr(NUMBERS), gl.constexpr(BYTES)
_WORDS_USED = gl.constexpr(WORDS_USED)
_CODES, _CODES_USED = gl.constexpr(CODES), gl.constexpr(CODES_USED)


@gluon.jit
def _pair(low, high):
    """Two bfloat16 as a word."""
    below = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return below | (high.to(gl.int16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _pairs(x, columns: gl.constexpr):
    """bf16 [V, 2 W] as words [V, W]."""
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return gl.convert_layout(_pair(low, high), columns)


@gluon.jit
def _fours_of_codes(x, columns: gl.constexpr):
    """e4m3 [V, 4 W] as words [V, W]."""
    bits = x.to(gl.int8, bitcast=True).to(gl.int32) & 0xFF
    even, odd = gl.split(gl.reshape(bits, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    word = first | (second << 8) | (third << 16) | (fourth << 24)
    return gl.convert_layout(word, columns)


@gluon.jit
def _words_times(w, x, BITS: gl.constexpr):
    """Words [R, V, W] of weights times those [V, W] of x: f32 [R, W], of whose diagonal the sums
    are those over V of a lane's group.
    """
    V: gl.constexpr = w.shape[1]
    TEXT: gl.constexpr = _BYTES[V] if BITS == 8 else _NUMBERS[V]
    USED: gl.constexpr = _WORDS_USED[V]
    wide, _ = gl.broadcast(gl.expand_dims(x, 0), w)
    found = gl.inline_asm_elementwise(
        TEXT, USED, [w, wide], dtype=gl.float32, is_pure=True, pack=4 * V
    )
    return gl.sum(found, 1)


@gluon.jit
def _codes_times(w, a, b, c, d):
    """Words [R, V, W] of 4-bit codes times x: f32 [R, V, W], of each vector the sums of a lane's
    group on the diagonal; a to d meet codes i and i + 4.
    """
    TEXT: gl.constexpr = _CODES
    USED: gl.constexpr = _CODES_USED
    wide_a, _ = gl.broadcast(gl.expand_dims(a, 0), w)
    wide_b, _ = gl.broadcast(gl.expand_dims(b, 0), w)
    wide_c, _ = gl.broadcast(gl.expand_dims(c, 0), w)
    wide_d, _ = gl.broadcast(gl.expand_dims(d, 0), w)
    return gl.inline_asm_elementwise(
        TEXT, USED, [w, wide_a, wide_b, wide_c, wide_d], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def _scaled(found, own, scale):
    """f32 [R, W] of codes' sums [R, V, W], what they are too much taken off, times scales
    [R, V, W / 4].
    """
    R: gl.constexpr = found.shape[0]
    V: gl.constexpr = found.shape[1]
    W: gl.constexpr = found.shape[2]
    less = gl.reshape(found - own, [R, V, W // 4, 4])
    scale = gl.convert_layout(scale, gl.SliceLayout(3, less.type.layout))
    return gl.sum(gl.reshape(less * gl.expand_dims(scale, 3), [R, V, W]), 1)


@gluon.jit
def _on_diagonal(found, layout: gl.constexpr):
    """f32 [R, W] of all lanes' results: zeros for those that are not on the diagonal."""
    found = gl.convert_layout(found, layout)
    word = gl.arange(0, found.shape[1], layout=gl.SliceLayout(0, layout))
    lane = word // 4 % 32
    group = lane // 4
    wanted = (word % 4 == group % 2) & (lane % 4 == group // 2)
    return gl.where(wanted[None, :], found, 0.0)


@gluon.jit
def _two_sums(one, other, layout: gl.constexpr):
    """Sums [R] of the diagonals of two f32 [R, W], by one reduction."""
    both = gl.join(_on_diagonal(one, layout), _on_diagonal(other, layout))
    return gl.split(gl.sum(both, 1))


@gluon.jit
def _group_scales(
    by,
    row,
    GROUP: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    vectors: gl.constexpr,
    R: gl.constexpr,
):
    """Scales [R, V, W / 4] of what a thread has of rows from ``row`` on."""
    C: gl.constexpr = 32 * vectors.warps_per_cta[2]
    r = gl.arange(0, R, layout=gl.SliceLayout(1, gl.SliceLayout(2, vectors)))
    v = gl.arange(0, V, layout=gl.SliceLayout(0, gl.SliceLayout(2, vectors)))
    c = gl.arange(0, C, layout=gl.SliceLayout(0, gl.SliceLayout(1, vectors)))
    vector = v[None, :, None] * C + c[None, None, :]
    group = gl.where(vector < K // 32, vector // (GROUP // 32), 0)
    return gl.load(by + ((row + r) * (K // GROUP))[:, None, None] + group)


@gluon.jit
def _half_row(row, half: gl.constexpr, N: gl.constexpr, R: gl.constexpr, GATED: gl.constexpr):
    """The first row of the weight that half a tile at ``row`` has."""
    if GATED:
        return row // 2 + half * (N // 2)
    return row + half * (R // 2)


@gluon.jit
def _write_halves(
    one, other, old, out, row, R: gl.constexpr, GATED: gl.constexpr, ADDED: gl.constexpr,
    STEPWISE: gl.constexpr,
):  # fmt: skip
    """What is made of the sums [R / 2] of both halves of a tile."""
    r = gl.arange(0, R // 2, layout=one.type.layout)
    if GATED:
        gate, up = _rounded(one), _rounded(other)
        gate = gate / (1.0 + gl.exp(-gate))
        if STEPWISE:
            gate = _rounded(gate)
        gl.store(out + row // 2 + r, (gate * up).to(gl.bfloat16))
    else:
        if ADDED:
            one = _rounded(one) + gl.load(old + row + r, volatile=True).to(gl.float32)
            there = gl.load(old + row + R // 2 + r, volatile=True).to(gl.float32)
            other = _rounded(other) + there
        gl.store(out + row + r, one.to(gl.bfloat16))
        gl.store(out + row + R // 2 + r, other.to(gl.bfloat16))


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
    """As that of ring_product_kernel.py, of weights in bfloat16, codes of 8 bits whose x is rounded
    to such too, or codes of 4 bits with scales of a multiple of 128 columns.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = ring.shape[0]
    R: gl.constexpr = ring.shape[1] * ring.shape[2] * 16 // BITS // P
    TILES: gl.constexpr = N // R
    ALONG: gl.constexpr = max(WARPS // R, min(WARPS, P // 2048), 1)
    E: gl.constexpr = 128 // BITS  # weights of 16 bytes
    V: gl.constexpr = P // (32 * E * ALONG)  # times 16 bytes that a thread has of a row
    W: gl.constexpr = 128 * ALONG
    numbers: gl.constexpr = gl.BlockedLayout(
        [1, V, E], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    words: gl.constexpr = gl.BlockedLayout(
        [1, V, 4], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    vectors: gl.constexpr = gl.BlockedLayout(
        [1, V, 1], [1, 1, 32], [WARPS // ALONG, 1, ALONG], [2, 1, 0]
    )
    columns: gl.constexpr = gl.SliceLayout(0, words)
    flat: gl.constexpr = gl.SliceLayout(1, words)
    HALVES: gl.constexpr = 2 if R > 1 else 1
    H: gl.constexpr = R // HALVES
    weights = ring._reinterpret(
        gl.int32, [SLOTS * HALVES, H, V, W], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    gl.static_assert(HALVES == 2 or (BITS == 16 and not GATED), "a row of codes is half a tile")
    first, end = _mine(begin, TILES)
    _time(timeline, call, 0, TIMED)
    if first < end:
        r = gl.arange(0, H, layout=gl.SliceLayout(1, flat))
        row = (gl.program_id(0) + first * gl.num_programs(0) - begin) * R
        if BITS == 8:
            scale_0 = gl.load(by + _half_row(row, 0, N, R, GATED) + r)
            scale_1 = gl.load(by + _half_row(row, 1, N, R, GATED) + r)
        if BITS == 4:
            at_0, at_1 = _half_row(row, 0, N, R, GATED), _half_row(row, 1, N, R, GATED)
            scale_0 = _group_scales(by, at_0, GROUP, K, V, vectors, H)
            scale_1 = _group_scales(by, at_1, GROUP, K, V, vectors, H)
        values = _input(x, norm, diagnosis, call, limit, V, K, P, NORMED, EPS)
        if ROUNDS:
            values, step = _codes_of(values)
        values = gl.convert_layout(values.to(gl.bfloat16), gl.SliceLayout(0, numbers))
        if BITS == 16:
            x_words = _pairs(values, columns)
        elif BITS == 8:
            x_words = _fours_of_codes(values.to(gl.float8e4nv), columns)
        else:
            x0, x1, x2, x3, x4, x5, x6, x7 = _eighths(values, columns)
            a, b, c, d = _pair(x0, x4), _pair(x1, x5), _pair(x2, x6), _pair(x3, x7)
            # Codes of 8 stand for 136.
            own = _codes_times(gl.full([1, V, W], -0x77777778, gl.int32, words), a, b, c, d)
        _time(timeline, call, 1, TIMED)
        for item in range(first, end):
            slot = item % SLOTS
            phase = (item // SLOTS) & 1
            row = (gl.program_id(0) + item * gl.num_programs(0) - begin) * R
            if BITS < 16:
                here_0, here_1 = scale_0.to(gl.float32), scale_1.to(gl.float32)
                # Those of the next tile: they come from memory, as its weights do.
                later = gl.minimum(item + 1, end - 1)
                later = (gl.program_id(0) + later * gl.num_programs(0) - begin) * R
                at_0, at_1 = _half_row(later, 0, N, R, GATED), _half_row(later, 1, N, R, GATED)
                if BITS == 8:
                    scale_0 = gl.load(by + at_0 + r)
                    scale_1 = gl.load(by + at_1 + r)
                else:
                    scale_0 = _group_scales(by, at_0, GROUP, K, V, vectors, H)
                    scale_1 = _group_scales(by, at_1, GROUP, K, V, vectors, H)
            mbarrier.wait(ready.index(slot * 2), phase)
            if HALVES == 2:
                w = weights.index(slot * 2).load(words)
                if BITS == 4:
                    one = _scaled(_codes_times(w, a, b, c, d), own, here_0)
                else:
                    one = _words_times(w, x_words, BITS)
                mbarrier.wait(ready.index(slot * 2 + 1), phase)
                w = weights.index(slot * 2 + 1).load(words)
                tl.debug_barrier()  # all have read the slot
                mbarrier.arrive(free.index(slot))
                if BITS == 4:
                    other = _scaled(_codes_times(w, a, b, c, d), own, here_1)
                else:
                    other = _words_times(w, x_words, BITS)
                one, other = _two_sums(one, other, flat)
                if ROUNDS:
                    one, other = one * step, other * step
                if BITS == 8:
                    one *= gl.convert_layout(here_0, one.type.layout)
                    other *= gl.convert_layout(here_1, one.type.layout)
                _write_halves(one, other, old, out, row, R, GATED, ADDED, STEPWISE)
            else:
                mbarrier.wait(ready.index(slot * 2 + 1), phase)
                w = weights.index(slot).load(words)
                tl.debug_barrier()
                mbarrier.arrive(free.index(slot))
                sums = gl.sum(_on_diagonal(_words_times(w, x_words, BITS), flat), 1)
                added = 0.0
                if ADDED:
                    at = old + row + gl.arange(0, R, layout=sums.type.layout)
                    added = gl.load(at, volatile=True)
                _write(sums, added, out, row, R, GATED, ADDED, STEPWISE)
    _time(timeline, call, 2, TIMED)
    return begin + TILES
