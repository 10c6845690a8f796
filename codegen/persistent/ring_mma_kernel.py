"""Products in a ring by tensor cores, without moving a byte, in PTX.

In an mma of m16n8k16 a lane gives rows g and g + 8 of A, and column g of B, the same k of each:
2 t, 2 t + 1, 2 t + 8 and 2 t + 9, where g is lane / 4 and t lane % 4. So if each lane puts its
words of two rows of weights into A and its words of x into B, elements (g, g) and (g + 8, g) of the
result are the products of both rows with x over what the four lanes of group g have. Of 128
elements these 16 are wanted: an eighth of the work, of which there is plenty. Both lie in lane
4 g + g / 2: the first and the third of its four results where g is even, the second and the fourth
where it is odd.

Codes of 8 bits become float16, which has all of them (and tensor cores of sm_90 have no other way
with them in registers). Codes of 4 bits become bfloat16 by one mask for two of them: 0x4300 and a
code n are 128 + n. What that is too much is the same product with 136 in the place of weights. Four
lanes have 128 codes in a row, so that a scale belongs to whole groups of lanes.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_CHAINS = 2
"""Sums that go on beside each other: an mma waits for the one before it that adds to the same."""


def _begin(words: int) -> list[str]:
    sums = 4 * _CHAINS
    declared = (
        f"{{ .reg .b32 lane, w<{words}>; .reg .b16 h<2>; .reg .f32 c<{sums}>; .reg .pred odd;"
    )
    return [declared, *(f"mov.f32 c{i}, 0f00000000;" for i in range(sums))]


def _mma(kind: str, chain: int, rows: Sequence[str], x: Sequence[str]) -> str:
    """Adds the product of two words each of two rows, first words first, to a chain's sums."""
    sums = ", ".join(f"c{4 * chain + i}" for i in range(4))
    a, b = ", ".join(rows), ", ".join(x)
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    return f"{name} {{{sums}}}, {{{a}}}, {{{b}}}, {{{sums}}};"


def _end(count: int) -> list[str]:
    """Both rows' sums of the lane's group, each the first of ``count`` results, and zeros."""
    lines = [
        f"add.f32 c{i}, c{i}, c{4 * chain + i};" for chain in range(1, _CHAINS) for i in range(4)
    ]
    lines += ["mov.u32 lane, %laneid;", "and.b32 lane, lane, 4;", "setp.ne.u32 odd, lane, 0;"]
    lines += ["selp.f32 $0, c1, c0, odd;", f"selp.f32 ${count}, c3, c2, odd;"]
    nothing = (f"mov.f32 ${i}, 0f00000000;" for i in range(1, 2 * count) if i != count)
    return [*lines, *nothing, "}"]


def _places(count: int, operands: int) -> list[list[str]]:
    """Of so many operands behind two results, each of ``count`` words, the names."""
    return [[f"${(2 + i) * count + j}" for j in range(count)] for i in range(operands)]


def _of_numbers(vectors: int) -> str:
    """bfloat16 of two rows and x, so many times four words of each."""
    count = 4 * vectors
    one, other, x = _places(count, 3)
    lines = _begin(1)
    for i in range(0, count, 2):
        rows = (one[i], other[i], one[i + 1], other[i + 1])
        lines += [_mma("bf16", i // 2 % _CHAINS, rows, (x[i], x[i + 1]))]
    return " ".join((*lines, *_end(count)))


def _of_bytes(vectors: int) -> str:
    """Codes of 8 bits of two rows, and float16 that meet their first and their last two."""
    count = 4 * vectors
    one, other, low, high = _places(count, 4)
    lines = _begin(4)
    for i in range(count):
        for row, word in enumerate((one[i], other[i])):
            lines += [f"mov.b32 {{h0, h1}}, {word};"]
            lines += [f"cvt.rn.f16x2.e4m3x2 w{row + 2 * half}, h{half};" for half in range(2)]
        lines += [_mma("f16", i % _CHAINS, ("w0", "w1", "w2", "w3"), (low[i], high[i]))]
    return " ".join((*lines, *_end(count)))


def _of_codes() -> str:
    """Four words of 4-bit codes of two rows, and bfloat16 that meet codes i and i + 4."""
    one, other, *x = _places(4, 6)
    lines = _begin(4)
    for word in range(4):
        for i in (0, 2):
            for place, source in enumerate((one[word], other[word]) * 2):
                shift = 4 * (i + place // 2)
                lines += [f"shr.b32 w{place}, {source}, {shift};"]
                lines += [f"lop3.b32 w{place}, w{place}, 0x000f000f, 0x43004300, 0xea;"]
            rows = ("w0", "w1", "w2", "w3")
            lines += [_mma("bf16", i // 2 % _CHAINS, rows, (x[i][word], x[i + 1][word]))]
    return " ".join((*lines, *_end(4)))


def _of_one_row(vectors: int) -> str:
    """bfloat16 of a row and x, so many times four words of each: the other row is zeros."""
    count = 4 * vectors
    row, x = _places(count, 2)
    lines = [*_begin(1), "mov.b32 w0, 0;"]
    for i in range(0, count, 2):
        lines += [
            _mma("bf16", i // 2 % _CHAINS, (row[i], "w0", row[i + 1], "w0"), (x[i], x[i + 1]))
        ]
    return " ".join((*lines, *_end(count)))


def _used(count: int, operands: int) -> str:
    return ",".join(["=f"] * 2 * count + ["r"] * operands * count)


_VECTORS = {"_NUMBERS": (4, 8), "_BYTES": (2, 4, 8), "_ROW": (8, 16)}  # that sizes of a ring make
TEXTS: dict[str, dict[int, str] | str] = {
    "_NUMBERS": {count: _of_numbers(count) for count in _VECTORS["_NUMBERS"]},
    "_NUMBERS_USED": {count: _used(4 * count, 3) for count in _VECTORS["_NUMBERS"]},
    "_BYTES": {count: _of_bytes(count) for count in _VECTORS["_BYTES"]},
    "_BYTES_USED": {count: _used(4 * count, 4) for count in _VECTORS["_BYTES"]},
    "_ROW": {count: _of_one_row(count) for count in _VECTORS["_ROW"]},
    "_ROW_USED": {count: _used(4 * count, 2) for count in _VECTORS["_ROW"]},
    # Not by conversions and shifts of bytes: Triton 3.6's machine code read some before they were.
    "_NARROWER": "{ .reg .b16 h<2>; cvt.rn.satfinite.e4m3x2.f32 h0, $2, $1;"
    " cvt.rn.satfinite.e4m3x2.f32 h1, $4, $3; mov.b32 $0, {h0, h1}; }",
    "_WIDER": "{ .reg .b16 h<2>; mov.b32 {h0, h1}, $2;"
    " cvt.rn.f16x2.e4m3x2 $0, h0; cvt.rn.f16x2.e4m3x2 $1, h1; }",
    "_CODES": _of_codes(),
    "_CODES_USED": _used(4, 6),
}
"""Constants of the kernel's text, by name: PTX, and its constraints."""
_NUMBERS, _NUMBERS_USED = gl.constexpr(TEXTS["_NUMBERS"]), gl.constexpr(TEXTS["_NUMBERS_USED"])
_BYTES, _BYTES_USED = gl.constexpr(TEXTS["_BYTES"]), gl.constexpr(TEXTS["_BYTES_USED"])
_ROW, _ROW_USED = gl.constexpr(TEXTS["_ROW"]), gl.constexpr(TEXTS["_ROW_USED"])
_NARROWER, _WIDER = gl.constexpr(TEXTS["_NARROWER"]), gl.constexpr(TEXTS["_WIDER"])
_CODES, _CODES_USED = gl.constexpr(TEXTS["_CODES"]), gl.constexpr(TEXTS["_CODES_USED"])


@gluon.jit
def _pair(low, high):
    """Two numbers of 16 bits as a word."""
    below = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return below | (high.to(gl.int16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _pairs(x, columns: gl.constexpr):
    """bf16 [V, 2 W] as words [V, W]."""
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return gl.convert_layout(_pair(low, high), columns)


@gluon.jit
def _fours(x, columns: gl.constexpr):
    """Numbers [V, 4 W] that are to be e4m3 as words [V, W] of float16, those of the first two of
    each four and those of the last two.
    """
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    words = gl.inline_asm_elementwise(
        _NARROWER, "=r,f,f,f,f", [first, second, third, fourth], dtype=gl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        _WIDER, "=r,=r,r", [gl.convert_layout(words, columns)], dtype=(gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _eights(x, columns: gl.constexpr):
    """bf16 [V, 8 W] as words [V, W] of x that meet codes i and i + 4 of each eight."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 2, 2, 2]))
    x04, x26 = gl.split(even)
    x15, x37 = gl.split(odd)
    x0, x4 = gl.split(x04)
    x2, x6 = gl.split(x26)
    x1, x5 = gl.split(x15)
    x3, x7 = gl.split(x37)
    return (
        gl.convert_layout(_pair(x0, x4), columns),
        gl.convert_layout(_pair(x1, x5), columns),
        gl.convert_layout(_pair(x2, x6), columns),
        gl.convert_layout(_pair(x3, x7), columns),
    )


@gluon.jit
def _firsts(found):
    """f32 [H, C] of results [H, V, 4 C], of which the first of 4 V that a lane has is one."""
    H: gl.constexpr = found.shape[0]
    V: gl.constexpr = found.shape[1]
    C: gl.constexpr = found.shape[2] // 4
    found = gl.permute(gl.reshape(found, [H, V, C, 4]), (0, 2, 1, 3))
    found = gl.reshape(found, [H, C, 4 * V])
    for _ in gl.static_range(V.bit_length() + 1):
        found, _others = gl.split(gl.reshape(found, [H, C, found.shape[2] // 2, 2]))
    return gl.reshape(found, [H, C])


@gluon.jit
def _first_of_fours(found, vectors: gl.constexpr):
    """f32 [H, V, C] of results [H, V, 4 C], of which the first of 4 that a lane has is one."""
    H: gl.constexpr = found.shape[0]
    V: gl.constexpr = found.shape[1]
    even, _odd = gl.split(gl.reshape(found, [H, V, found.shape[2] // 4, 2, 2]))
    first, _third = gl.split(even)
    return gl.convert_layout(first, vectors)


@gluon.jit
def _numbers_times(one, other, x):
    """Words [H, V, W] of bfloat16 of two rows times those [V, W] of x: f32 [H, W / 4] of both,
    right in lanes that `_two_sums` takes.
    """
    V: gl.constexpr = one.shape[1]
    TEXT: gl.constexpr = _NUMBERS[V]
    USED: gl.constexpr = _NUMBERS_USED[V]
    x, _ = gl.broadcast(gl.expand_dims(x, 0), one)
    one, other = gl.inline_asm_elementwise(
        TEXT, USED, [one, other, x], dtype=(gl.float32, gl.float32), is_pure=True, pack=4 * V
    )
    return _firsts(one), _firsts(other)


@gluon.jit
def _row_times(row, x):
    """As `_numbers_times`, of one row."""
    V: gl.constexpr = row.shape[1]
    TEXT: gl.constexpr = _ROW[V]
    USED: gl.constexpr = _ROW_USED[V]
    x, _ = gl.broadcast(gl.expand_dims(x, 0), row)
    row, _ = gl.inline_asm_elementwise(
        TEXT, USED, [row, x], dtype=(gl.float32, gl.float32), is_pure=True, pack=4 * V
    )
    return _firsts(row)


@gluon.jit
def _bytes_times(one, other, low, high):
    """As `_numbers_times`, of codes of 8 bits."""
    V: gl.constexpr = one.shape[1]
    TEXT: gl.constexpr = _BYTES[V]
    USED: gl.constexpr = _BYTES_USED[V]
    low, _ = gl.broadcast(gl.expand_dims(low, 0), one)
    high, _ = gl.broadcast(gl.expand_dims(high, 0), one)
    one, other = gl.inline_asm_elementwise(
        TEXT, USED, [one, other, low, high], dtype=(gl.float32, gl.float32), is_pure=True,
        pack=4 * V,
    )  # fmt: skip
    return _firsts(one), _firsts(other)


@gluon.jit
def _codes_times(one, other, a, b, c, d, vectors: gl.constexpr):
    """Words [H, V, W] of codes of 4 bits of two rows times x: f32 [H, V, W / 4] of both."""
    TEXT: gl.constexpr = _CODES
    USED: gl.constexpr = _CODES_USED
    a, _ = gl.broadcast(gl.expand_dims(a, 0), one)
    b, _ = gl.broadcast(gl.expand_dims(b, 0), one)
    c, _ = gl.broadcast(gl.expand_dims(c, 0), one)
    d, _ = gl.broadcast(gl.expand_dims(d, 0), one)
    one, other = gl.inline_asm_elementwise(
        TEXT, USED, [one, other, a, b, c, d], dtype=(gl.float32, gl.float32), is_pure=True, pack=4
    )
    return _first_of_fours(one, vectors), _first_of_fours(other, vectors)


@gluon.jit
def _two_sums(one, other, lanes: gl.constexpr):
    """f32 [H] each: what the lanes of two [H, C] that have a sum of their group have together."""
    lane = gl.arange(0, one.shape[1], layout=gl.SliceLayout(0, lanes)) % 32
    wanted = (lane % 4 == lane // 8)[None, :]
    one = gl.where(wanted, gl.convert_layout(one, lanes), 0.0)
    other = gl.where(wanted, gl.convert_layout(other, lanes), 0.0)
    one, other = gl.split(gl.sum(gl.join(one, other), 1))
    return (
        gl.convert_layout(one, gl.SliceLayout(1, lanes)),
        gl.convert_layout(other, gl.SliceLayout(1, lanes)),
    )
