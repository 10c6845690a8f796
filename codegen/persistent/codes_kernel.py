"""The device side of products with codes: what generate.py puts into a kernel's text for them.

A chunk of the stream is WORDS words of R rows, LANE of a row in each thread, next to each other. A
word holds 2 weights in bfloat16, 4 codes of e4m3, or 8 of 4 bits, the first in its low bits. An
entry's cells are the address, the distance of rows in units of LANE words, the words that there are
(low half) and the distance of rows of scales (high half), and the address of scales.

x comes as float32 [columns of a chunk], of which a thread has what its words meet.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ..triton.functions import _by_largest
from .kernel import _rounded


@triton.jit
def _word_entry(items, item):
    """An entry: address, distance of rows, words, scales, and the distance of rows of these."""
    cell = items + item * 4
    both = tl.load(cell + 2)
    step = tl.load(cell + 1).to(tl.int32)
    return tl.load(cell), step, both.to(tl.int32), tl.load(cell + 3), (both >> 32).to(tl.int32)


@triton.jit
def _word_chunk(
    base, step, left, R: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr, MASKED: tl.constexpr
):
    """The words [R, WORDS] of an entry; they are read once, so others' data stays in L2."""
    row = tl.arange(0, R)
    word = tl.arange(0, WORDS)
    # No more is promised than LANE words, so that a thread has just these of a row.
    start = tl.multiple_of(base.to(tl.pointer_type(tl.int32)), 4 * LANE)
    cells = start + (row * (step * LANE))[:, None] + word[None, :]
    if MASKED:
        there = (word < tl.multiple_of(left, LANE))[None, :]
        return tl.load(cells, mask=there, other=0, eviction_policy="evict_first")
    return tl.load(cells, eviction_policy="evict_first")


@triton.jit
def _chunk_scales(
    base,
    pitch,
    left,
    R: tl.constexpr,
    WORDS: tl.constexpr,
    LANE: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The scale [R, WORDS / LANE] of what each thread has of each row, 8 columns.

    Rows come last until all is read: Triton lets threads follow the first axis where neither has
    neighbours, and here they must lie as those of a chunk do.
    """
    row = tl.arange(0, R)
    lane = tl.arange(0, WORDS // LANE)
    start = base.to(tl.pointer_type(tl.float32 if SCALE == 4 else tl.bfloat16))
    cells = start + (row * pitch)[None, :] + (lane // (GROUP // 8))[:, None]
    if MASKED:
        return tl.trans(tl.load(cells, mask=(lane * LANE < left)[:, None], other=0.0))
    return tl.trans(tl.load(cells))


@triton.jit
def _ask_words(
    items, item, R: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr, MASKED: tl.constexpr
):
    """Asks for a chunk to be brought to L2, a line of 128 bytes at a time."""
    LINES: tl.constexpr = WORDS // 32
    base, step, left, _scale, _pitch = _word_entry(items, item)
    row = tl.arange(0, R)
    word = tl.arange(0, LINES) * 32
    if MASKED:
        word = tl.minimum(word, tl.maximum(left - LANE, 0))
    start = base.to(tl.pointer_type(tl.int32))
    lines = start + (row * (step * LANE))[:, None] + word[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _halves(x):
    """The numbers of x at even places, and those at odd ones."""
    return tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))


@triton.jit
def _lanes(terms, R: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr):
    """Sums over what a thread has of a row: [R, WORDS / LANE]."""
    if LANE == 1:
        return terms
    return tl.sum(tl.reshape(terms, (R, WORDS // LANE, LANE)), axis=2)


@triton.jit
def _of_numbers(acc, w, x, R: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr):
    """acc f32 [R, WORDS / LANE] and the products of a chunk in bfloat16 with x [2 WORDS]."""
    even, odd = _halves(x)
    low = (w << 16).to(tl.float32, bitcast=True)
    high = (w & -65536).to(tl.float32, bitcast=True)
    return acc + _lanes(low * even[None, :] + high * odd[None, :], R, WORDS, LANE)


@triton.jit
def _four_numbers(w, DEVICE: tl.constexpr):
    """What the four codes of e4m3 in each word stand for, the lowest first."""
    if DEVICE:
        # fmt: off
        first, second, third, fourth = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high, a, b, c, d; .reg .b32 one, two;"
            " mov.b32 {low, high}, $4;"
            " cvt.rn.f16x2.e4m3x2 one, low; cvt.rn.f16x2.e4m3x2 two, high;"
            " mov.b32 {a, b}, one; mov.b32 {c, d}, two;"
            " cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }",
            "=f,=f,=f,=f,r",
            [w],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        # fmt: on
    else:
        first = w.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        second = (w >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        third = (w >> 16).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        fourth = (w >> 24).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return first, second, third, fourth


@triton.jit
def _of_bytes(w, x, R: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr, DEVICE: tl.constexpr):
    """The products of a chunk of e4m3 with x [4 WORDS], not scaled: f32 [R, WORDS / LANE]."""
    even, odd = _halves(x)
    x_first, x_third = _halves(even)
    x_second, x_fourth = _halves(odd)
    first, second, third, fourth = _four_numbers(w, DEVICE)
    terms = first * x_first[None, :] + second * x_second[None, :]
    terms += third * x_third[None, :] + fourth * x_fourth[None, :]
    return _lanes(terms, R, WORDS, LANE)


@triton.jit
def _nibble(w, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """16 more than a code of 4 bits: its bits, brought to where those of 16 leave off."""
    bits = (w << LEFT) if LEFT > 0 else (w >> RIGHT)
    return ((bits & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)


@triton.jit
def _of_nibbles(w, x, R: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr):
    """The products of a chunk of 4-bit codes less 8 with x [8 WORDS], not scaled: f32
    [R, WORDS / LANE].
    """
    even, odd = _halves(x)
    x04, x26 = _halves(even)
    x15, x37 = _halves(odd)
    x0, x4 = _halves(x04)
    x2, x6 = _halves(x26)
    x1, x5 = _halves(x15)
    x3, x7 = _halves(x37)
    own = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    terms = _nibble(w, 19, 0) * x0[None, :] - 24.0 * own[None, :]
    terms += _nibble(w, 15, 0) * x1[None, :]
    terms += _nibble(w, 11, 0) * x2[None, :]
    terms += _nibble(w, 7, 0) * x3[None, :]
    terms += _nibble(w, 3, 0) * x4[None, :]
    terms += _nibble(w, 0, 1) * x5[None, :]
    terms += _nibble(w, 0, 5) * x6[None, :]
    terms += _nibble(w, 0, 9) * x7[None, :]
    return _lanes(terms, R, WORDS, LANE)


@triton.jit
def _normed(x, norm, scale, STEPWISE: tl.constexpr):
    """x times the scale of its norm and the norm's weight, as bfloat16 has it."""
    value = x * scale
    if STEPWISE:
        value = _rounded(value)
    return _rounded(value * norm)


@triton.jit
def _size(x):
    """Magnitudes, infinite where x is not finite."""
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def _code_scale(largest):
    """The scale by which the largest magnitude becomes the largest code; NaN if it is infinite, so
    that all products are.
    """
    scale = tl.div_rn(largest, 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(scale == float("inf"), float("nan"), scale)


@triton.jit
def _code_values(x, scale, DEVICE: tl.constexpr):
    """What the codes of x stand for before they are scaled: float32, as e4m3 has it."""
    steps = _by_largest(x, scale, DEVICE)
    steps = tl.minimum(tl.maximum(steps, -448.0), 448.0)
    return steps.to(tl.float8e4nv).to(tl.float32)


@triton.jit
def _group_values(x, GROUP: tl.constexpr, DEVICE: tl.constexpr):
    """What the codes of x stand for, by a scale of each GROUP of it."""
    groups = tl.reshape(x, (x.shape[0] // GROUP, GROUP))
    scale = _code_scale(tl.max(_size(groups), axis=1, keep_dims=True))
    return tl.reshape(_code_values(groups, scale, DEVICE) * scale, (x.shape[0],))
