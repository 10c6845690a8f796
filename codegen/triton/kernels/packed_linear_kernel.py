"""The device side of products of 4-bit weights and rows rounded to int8: what packed_linear.py puts
into a kernel's text, beside functions of the other kernels of products.

A word is 4 bytes of a row of codes: 8 columns, the even ones in the low halves of its bytes. Codes
of x [T, 2, HALF] are those of all even columns of a row, then those of the odd ones, so that bytes
of a word meet the bytes of one word of each. Codes behind the last column are 0.

A 4-bit code less 8, times 16, is what its bits are in the high half of a signed byte, the highest
one turned over. So products have it, which costs less than its value; their sums are divided in the
end. Those within a group are exact in int32.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .linear_kernel import _inputs, _prefetch
from .quant_linear_kernel import _coded, _of_spans, _shared_rows
from .scaled_linear_kernel import _group_scales, _normed_row, _rounded


@triton.jit
def _pack_rows(
    x,
    norm,
    out,
    scales,
    sums,
    x_stride,
    K: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    STEPWISE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program, of ``rms_norm(x, norm)`` where there is one: its codes to ``out``
    [T, 2, HALF], the scales of its groups to ``scales`` and, unless that is None, the sums of the
    codes of each SPAN columns, i32, to ``sums``.
    """
    PARTS: tl.constexpr = BLOCK_K // GROUP
    GROUPS: tl.constexpr = (2 * HALF + GROUP - 1) // GROUP
    SPANS: tl.constexpr = (2 * HALF + SPAN - 1) // SPAN
    row = tl.program_id(0).to(tl.int64)
    value = _normed_row(x + row * x_stride, norm, K, NORM, EPS, STEPWISE, BLOCK_K, PDL)
    groups = tl.reshape(value, (PARTS, GROUP))
    scale = _group_scales(groups, LARGEST)
    codes = _rounded(groups, scale, LARGEST, True, PDL)
    part = tl.arange(0, PARTS)
    tl.store(scales + row * GROUPS + part, tl.reshape(scale, (PARTS,)), mask=part < GROUPS)
    # A NaN has no code; its group's scale is one.
    codes = tl.where(codes == codes, codes, 0.0).to(tl.int32)
    if sums is not None:
        span = tl.arange(0, BLOCK_K // SPAN)
        total = tl.sum(tl.reshape(codes, (BLOCK_K // SPAN, SPAN)), axis=1)
        tl.store(sums + row * SPANS + span, total, mask=span < SPANS)
    even, odd = tl.split(tl.reshape(codes.to(tl.int8), (BLOCK_K // 2, 2)))
    at = tl.arange(0, BLOCK_K // 2)
    half = out + row * (2 * HALF) + at
    tl.store(half, even, mask=at < HALF)
    tl.store(half + HALF, odd, mask=at < HALF)


@triton.jit
def _word_products(words, even, odd, PDL: tl.constexpr):
    """The sums of the products of a word's 8 codes, as bytes of 16 (code - 8), with those of x, of
    which 4 lie in each of two words: i32.
    """
    if PDL:  # the device reads PTX, which has an instruction for four products and their sum
        total = tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; shl.b32 low, $1, 4;"
            " lop3.b32 low, low, 0xF0F0F0F0, 0x80808080, 0x6A;"
            " lop3.b32 high, $1, 0xF0F0F0F0, 0x80808080, 0x6A;"
            " dp4a.s32.s32 low, low, $2, 0; dp4a.s32.s32 $0, high, $3, low; }",
            "=r,r,r,r",
            [words, even, odd],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        total = tl.zeros(words.shape, tl.int32)
        for byte in tl.static_range(4):  # a byte's sign comes with it from the top
            low = ((words >> (8 * byte)) & 15) - 8
            high = ((words >> (8 * byte + 4)) & 15) - 8
            total += low * ((even << (24 - 8 * byte)) >> 24)
            total += high * ((odd << (24 - 8 * byte)) >> 24)
        total *= 16
    return total


@triton.jit
def _less_zeros(part, own, zero):
    """What sums of products over codes less 8 are over codes less their zero points, both 16 times:
    f32. ``own`` are the sums of the codes of x. All are whole numbers that float32 holds.
    """
    wide = part.to(tl.float32)
    if zero is not None:
        wide -= own.to(tl.float32) * (zero * 16.0 - 128.0)
    return wide


@triton.jit
def _one_token_of_words(
    x,
    x_scale,
    x_sums,
    codes,
    scale,
    zero,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    X_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of codes of x times rows of the weight: f32 [R, 1]. What a thread loads at once, a
    span of 32 columns, is scaled as a whole. Two tiles of codes are on their way before x is
    waited for.
    """
    SPAN: tl.constexpr = 32
    WORDS: tl.constexpr = WIDTH // 4
    TILE: tl.constexpr = BLOCK_K // 8
    STEPS: tl.constexpr = (WORDS + TILE - 1) // TILE
    SPANS: tl.constexpr = BLOCK_K // SPAN
    X_GROUPS: tl.constexpr = (2 * HALF + X_GROUP - 1) // X_GROUP
    R: tl.constexpr = rows.shape[0]
    word = tl.arange(0, TILE)
    span = tl.arange(0, SPANS)[None, :]
    words = codes.to(tl.pointer_type(tl.int32)) + rows.to(tl.int64)[:, None] * WORDS
    even = x.to(tl.pointer_type(tl.int32))
    scales = _shared_rows(scale, rows, ROWS, GROUPS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = _coded(words, 0, WORDS, TILE)
    by = _of_spans(scales, 0, GROUPS, GROUP, SPAN, SPANS)
    ahead = now
    by_ahead = by
    if STEPS > 1:
        ahead = _coded(words, TILE, WORDS, TILE)
        if GROUP > 0:
            by_ahead = _of_spans(scales, BLOCK_K, GROUPS, GROUP, SPAN, SPANS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([R, SPANS], tl.float32)
    for step in tl.static_range(STEPS):
        later = ahead
        by_later = by_ahead
        if step + 2 < STEPS:
            later = _coded(words, (step + 2) * TILE, WORDS, TILE)
            if GROUP > 0:
                start = (step + 2) * BLOCK_K
                by_later = _of_spans(scales, start, GROUPS, GROUP, SPAN, SPANS)
        at = step * TILE + word
        low = _inputs(even, at, HALF // 4, TILE)[None, :]
        high = _inputs(even + HALF // 4, at, HALF // 4, TILE)[None, :]
        of_x = _of_spans(x_scale, step * BLOCK_K, X_GROUPS, X_GROUP, SPAN, SPANS)
        own = None
        less = None
        if zero is not None:
            own = _inputs(x_sums, step * SPANS + span, 2 * HALF // SPAN, SPANS)
            zeros = _shared_rows(zero, rows, ROWS, GROUPS)
            less = _of_spans(zeros, step * BLOCK_K, GROUPS, GROUP, SPAN, SPANS)
        part = tl.reshape(_word_products(now, low, high, PDL), (R, SPANS, SPAN // 8))
        part = _less_zeros(tl.sum(part, axis=2), own, less) * of_x
        acc += part if GROUP == 0 else part * by
        now = ahead
        ahead = later
        by = by_ahead
        by_ahead = by_later
    total = tl.sum(acc, axis=1, keep_dims=True)
    if GROUP == 0:
        total *= by
    return total * 0.0625


@triton.jit
def _byte_halves(codes, PDL: tl.constexpr):
    """The numbers in the low half of each byte, and in the high half, as 16 (number - 8): i8."""
    if PDL and codes.shape[0] * codes.shape[1] >= 512:  # 4 bytes a thread
        low, high = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 4; lop3.b32 $0, $0, 0xF0F0F0F0, 0x80808080, 0x6A;"
            " lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;",
            "=&r,=r,r",
            [codes],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((codes << 4) ^ 128).to(tl.int8, bitcast=True)
        high = ((codes & 240) ^ 128).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _tokens_of_words(
    x,
    x_scale,
    x_sums,
    codes,
    scale,
    zero,
    rows,
    tokens,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    X_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens of codes of x times rows of the weight over this program's part of the columns: f32
    [R, M]. The weight is the left operand, and a step lies within one group of each operand.
    """
    BYTES: tl.constexpr = BLOCK_K // 2
    TILES: tl.constexpr = (WIDTH + BYTES - 1) // BYTES
    SHARE: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * BYTES
    X_GROUPS: tl.constexpr = (2 * HALF + X_GROUP - 1) // X_GROUP
    SPANS: tl.constexpr = (2 * HALF + BLOCK_K - 1) // BLOCK_K
    R: tl.constexpr = rows.shape[0]
    M: tl.constexpr = tokens.shape[0]
    at = tl.arange(0, BYTES)[:, None]
    begin = tl.program_id(2) * SHARE if SPLITS > 1 else 0
    end = tl.minimum(begin + SHARE, WIDTH) if SPLITS > 1 else WIDTH
    code_rows = codes + rows.to(tl.int64)[:, None] * WIDTH
    scales = _shared_rows(scale, rows, ROWS, GROUPS)
    zeros = None if zero is None else _shared_rows(zero, rows, ROWS, GROUPS)
    token = tokens.to(tl.int64)[None, :]
    x_rows = x + token * (2 * HALF)
    x_scales = x_scale + token * X_GROUPS
    own_rows = None if zero is None else x_sums + token * SPANS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(code_rows, begin, WIDTH, AHEAD)
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([R, M], tl.float32)
    for byte in range(begin, end, BYTES):  # in bytes: of these the compiler knows the alignment
        low, high = _byte_halves(_coded(code_rows, byte, WIDTH, BYTES), PDL)
        even = _inputs(x_rows, byte + at, HALF, BYTES)
        odd = _inputs(x_rows + HALF, byte + at, HALF, BYTES)
        part = tl.dot(low, even, out_dtype=tl.int32)
        part = tl.dot(high, odd, part, out_dtype=tl.int32)
        group = 0 if GROUP == 0 else 2 * byte // GROUP
        own = None
        less = None
        if zeros is not None:
            own = tl.load(own_rows + byte // BYTES)
            less = tl.load(zeros + group).to(tl.float32)
        by = tl.load(x_scales + 2 * byte // X_GROUP)
        if GROUP > 0:
            by *= tl.load(scales + group).to(tl.float32)
        total += _less_zeros(part, own, less) * by
    if GROUP == 0:
        total *= tl.load(scales).to(tl.float32)
    return total * 0.0625
