"""The device side of products with quantized weights: what quant_linear.py puts into a kernel's
text, beside functions of linear_kernel.py.

``rows`` are rows of the weight, ``tokens`` those of x, both clamped to what exists. A row of codes
has WIDTH bytes, which are its K codes or, of 4 bits, two of them each, the even column in the low
half. SHARED columns, a power of two, lie within one group. SPAN of them, as many as fit what is
computed together, are scaled at once: so a scale is loaded for each span, and not for each code.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .linear_kernel import _inputs, _prefetch


@triton.jit
def _coded(rows, start, WIDTH: tl.constexpr, BYTES: tl.constexpr):
    """A tile of codes as they are stored: [R, BYTES] from byte ``start`` of each row."""
    at = start + tl.arange(0, BYTES)[None, :]
    if WIDTH % BYTES == 0:
        codes = tl.load(rows + at, eviction_policy="evict_first")
    else:
        codes = tl.load(rows + at, mask=at < WIDTH, other=0.0, eviction_policy="evict_first")
    return codes


@triton.jit
def _shared_rows(values, rows, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Pointers [R, 1] to the scales of each row: ROWS rows share theirs, 0 for all of them."""
    row = rows * 0 if ROWS == 0 else rows // ROWS
    return values + row.to(tl.int64)[:, None] * GROUPS


@triton.jit
def _of_spans(
    rows, start, GROUPS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr
):
    """The scale, or zero point, of each of SPANS spans from column ``start`` on: f32 [R, SPANS];
    [R, 1] where a group is a whole row.
    """
    if GROUP == 0:
        values = tl.load(rows)
    else:
        group = (start + tl.arange(0, SPANS)[None, :] * SPAN) // GROUP
        values = tl.load(rows + tl.minimum(group, GROUPS - 1))
    return values.to(tl.float32)


@triton.jit
def _nibbles(codes, PDL: tl.constexpr):
    """16 plus the number in the low half, and in the high half, of each byte: f32 as ``codes``.

    An integer that joins the bits of 16 is that number plus it, exactly. It costs less than a
    conversion: of 4 bytes in one register, a shift and one operation on three operands a number.
    """
    if PDL and codes.shape[0] * codes.shape[1] >= 512:  # the device reads PTX; 4 bytes a thread
        # fmt: off
        low, high = tl.inline_asm_elementwise(
            """
            shl.b32 $0, $8, 19; shl.b32 $1, $8, 11; shl.b32 $2, $8, 3; shr.b32 $3, $8, 5;
            shl.b32 $4, $8, 15; shl.b32 $5, $8, 7;  shr.b32 $6, $8, 1; shr.b32 $7, $8, 9;
            lop3.b32 $0, $0, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $1, $1, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $2, $2, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $3, $3, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $4, $4, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $5, $5, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $6, $6, 0x00780000, 0x41800000, 0xEA;
            lop3.b32 $7, $7, 0x00780000, 0x41800000, 0xEA;
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
        # fmt: on
    else:
        bits = codes.to(tl.int32)
        low = (((bits & 15) << 19) | 0x41800000).to(tl.float32, bitcast=True)
        high = (((bits & 240) << 15) | 0x41800000).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _raised(codes, SPAN: tl.constexpr):
    """What codes of 8 bits are before they are scaled, too high by ``_excess``: f32
    [R, K / SPAN, SPAN]. As in ``_nibbles``, an integer joins the bits of 256.
    """
    R: tl.constexpr = codes.shape[0]
    if codes.dtype == tl.int8:  # the sign's bit, turned over, adds 128
        wide = (((codes.to(tl.int32) & 255) << 15) ^ 0x43C00000).to(tl.float32, bitcast=True)
    else:
        wide = codes.to(tl.float32)
    return tl.reshape(wide, (R, codes.shape[1] // SPAN, SPAN))


@triton.jit
def _span_sums(codes, value, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr):
    """Sums over spans of codes, too high by ``_excess``, times ``value`` [BLOCK_K]: f32 [R, SPANS];
    and those of ``value`` itself, [1, SPANS].
    """
    R: tl.constexpr = codes.shape[0]
    SPANS: tl.constexpr = BLOCK_K // SPAN
    if codes.dtype == tl.uint8:
        even, odd = tl.split(tl.reshape(value, (BLOCK_K // 2, 2)))
        low, high = _nibbles(codes, PDL)
        terms = tl.fma(high, tl.broadcast_to(odd[None, :], high.shape), low * even[None, :])
        sums = tl.sum(tl.reshape(terms, (R, SPANS, SPAN // 2)), axis=2)
        own = tl.sum(tl.reshape(even + odd, (1, SPANS, SPAN // 2)), axis=2)
    else:
        spans = tl.reshape(value, (1, SPANS, SPAN))
        sums = tl.sum(_raised(codes, SPAN) * spans, axis=2)
        own = tl.sum(spans, axis=2)
    return sums, own


@triton.jit
def _excess(zero, kind: tl.constexpr):
    """How far ``_nibbles`` and ``_raised`` lie above what codes of that type stand for: their zero
    points, f32 [R, SPANS] or one for all, and what made floats of them.
    """
    PACKED: tl.constexpr = kind == tl.uint8
    SIGNED: tl.constexpr = kind == tl.int8
    RAISED: tl.constexpr = 16.0 if PACKED else 384.0 if SIGNED else 0.0
    MIDDLE: tl.constexpr = 8.0 if PACKED else 0.0
    return RAISED + MIDDLE if zero is None else zero + RAISED


@triton.jit
def _one_token_of_codes(
    x,
    norm,
    codes,
    scale,
    zero,
    rows,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [K] (as ``rms_norm(x, norm)``, where there is one) times rows of the weight: f32 [R, 1].

    Each span is added up and then scaled, rows with one scale at the end, so that nothing is
    rounded on the way. Two tiles of codes are on their way before x is waited for.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PER_BYTE: tl.constexpr = 2 if codes.dtype.element_ty == tl.uint8 else 1
    BYTES: tl.constexpr = BLOCK_K // PER_BYTE
    # A scale for what a thread loads at once; where there is none, what it loads of x.
    LOADED: tl.constexpr = 8 if GROUP == 0 else 16 * PER_BYTE
    MOST: tl.constexpr = LOADED if LOADED < BLOCK_K else BLOCK_K
    SPAN: tl.constexpr = SHARED if SHARED < MOST else MOST
    CODES: tl.constexpr = codes.dtype.element_ty
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    SPANS: tl.constexpr = BLOCK_K // SPAN
    EXACT: tl.constexpr = not CODES.is_int() and zero is None
    R: tl.constexpr = rows.shape[0]
    k = tl.arange(0, BLOCK_K)
    code_rows = codes + rows.to(tl.int64)[:, None] * WIDTH
    scales = _shared_rows(scale, rows, ROWS, GROUPS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = _coded(code_rows, 0, WIDTH, BYTES)
    by = _of_spans(scales, 0, GROUPS, GROUP, SPAN, SPANS)
    ahead = now
    by_ahead = by
    if STEPS > 1:
        ahead = _coded(code_rows, BYTES, WIDTH, BYTES)
        if GROUP > 0:
            by_ahead = _of_spans(scales, BLOCK_K, GROUPS, GROUP, SPAN, SPANS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([R, SPANS], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        later = ahead
        by_later = by_ahead
        if step + 2 < STEPS:
            later = _coded(code_rows, (step + 2) * BYTES, WIDTH, BYTES)
            if GROUP > 0:
                start = (step + 2) * BLOCK_K
                by_later = _of_spans(scales, start, GROUPS, GROUP, SPAN, SPANS)
        at = step * BLOCK_K + k
        value = _inputs(x, at, K, BLOCK_K).to(tl.float32)
        if NORM:
            squares += value * value
            if norm is not None:
                value *= _inputs(norm, at, K, BLOCK_K).to(tl.float32)
        less = None
        if zero is not None:
            zeros = _shared_rows(zero, rows, ROWS, GROUPS)
            less = _of_spans(zeros, step * BLOCK_K, GROUPS, GROUP, SPAN, SPANS)
        sums, own = _span_sums(now, value, BLOCK_K, SPAN, PDL)
        if not EXACT:  # the sum of x is one for all rows
            sums -= own * _excess(less, CODES)
        acc += sums if GROUP == 0 else sums * by
        now = ahead
        ahead = later
        by = by_ahead
        by_ahead = by_later
    total = tl.sum(acc, axis=1, keep_dims=True)
    if GROUP == 0:
        total *= by
    if NORM:
        total *= tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
    return total


@triton.jit
def _halves(codes, ELEMENT: tl.constexpr, PDL: tl.constexpr):
    """The number in the low half of each byte, and in the high half, less 8: exact in ELEMENT.

    Numbers of 16 bits are made two at a time: those that join the bits of 128 (of float16: 1024).
    """
    FOURS: tl.constexpr = PDL and codes.shape[0] * codes.shape[1] >= 512  # bytes a thread has
    # fmt: off
    if FOURS and tl.bfloat16 == ELEMENT:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, one, less;"
            " mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;"
            " prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;"
            " lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA;"
            " lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;"
            " shr.b32 a, a, 4; shr.b32 b, b, 4;"
            " lop3.b32 $2, a, 0x000F000F, 0x43004300, 0xEA;"
            " lop3.b32 $3, b, 0x000F000F, 0x43004300, 0xEA;"
            " fma.rn.bf16x2 $0, $0, one, less; fma.rn.bf16x2 $1, $1, one, less;"
            " fma.rn.bf16x2 $2, $2, one, less; fma.rn.bf16x2 $3, $3, one, less; }",
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif FOURS and tl.float16 == ELEMENT:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, one, less;"
            " mov.b32 one, 0x3C003C00; mov.b32 less, 0xE408E408;"
            " prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;"
            " lop3.b32 $0, a, 0x000F000F, 0x64006400, 0xEA;"
            " lop3.b32 $1, b, 0x000F000F, 0x64006400, 0xEA;"
            " shr.b32 a, a, 4; shr.b32 b, b, 4;"
            " lop3.b32 $2, a, 0x000F000F, 0x64006400, 0xEA;"
            " lop3.b32 $3, b, 0x000F000F, 0x64006400, 0xEA;"
            " fma.rn.f16x2 $0, $0, one, less; fma.rn.f16x2 $1, $1, one, less;"
            " fma.rn.f16x2 $2, $2, one, less; fma.rn.f16x2 $3, $3, one, less; }",
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    # fmt: on
    else:
        low, high = _nibbles(codes, False)
        low, high = (low - 24.0).to(ELEMENT), (high - 24.0).to(ELEMENT)
    return low, high


@triton.jit
def _of_tile(codes, value, ELEMENT: tl.constexpr, PDL: tl.constexpr):
    """Codes (4-bit ones less 8) times tokens of x [BLOCK_K, M], nothing scaled: f32 [R, M]."""
    M: tl.constexpr = value.shape[1]
    if codes.dtype == tl.uint8:
        pairs = tl.reshape(value, (codes.shape[1], 2, M))
        even, odd = tl.split(tl.permute(pairs, (0, 2, 1)))
        low, high = _halves(codes, ELEMENT, PDL)
        part = tl.dot(low, even, input_precision="ieee")
        part = tl.dot(high, odd, part, input_precision="ieee")
    else:
        # By way of float32: devices have no fast way from e4m3 to bfloat16.
        part = tl.dot(codes.to(tl.float32).to(ELEMENT), value, input_precision="ieee")
    return part


@triton.jit
def _scaled_tile(codes, by, less, SPAN: tl.constexpr, ELEMENT: tl.constexpr):
    """Codes of 8 bits times their scales, f32 [R, SPANS], and less their zero points, where there
    are such: rounded to the type that the weight declares.
    """
    R: tl.constexpr = codes.shape[0]
    spans = tl.reshape(codes.to(tl.float32), (R, codes.shape[1] // SPAN, SPAN))
    if less is not None:
        spans -= less[:, :, None]
    return tl.reshape(spans * by[:, :, None], codes.shape).to(ELEMENT)


@triton.jit
def _scaled_halves(codes, by, less, SPAN: tl.constexpr, ELEMENT: tl.constexpr):
    """The same of 4 bits, for the low halves of the bytes and the high ones."""
    R: tl.constexpr = codes.shape[0]
    low, high = _nibbles(codes, False)
    SHAPE: tl.constexpr = (R, 2 * codes.shape[1] // SPAN, SPAN // 2)
    raised = 24.0 if less is None else (less + 16.0)[:, :, None]
    low = (tl.reshape(low, SHAPE) - raised) * by[:, :, None]
    high = (tl.reshape(high, SHAPE) - raised) * by[:, :, None]
    return tl.reshape(low, codes.shape).to(ELEMENT), tl.reshape(high, codes.shape).to(ELEMENT)


@triton.jit
def _of_small_groups(codes, value, by, less, SPAN: tl.constexpr, ELEMENT: tl.constexpr):
    """Weights with several groups in a tile, each rounded to ELEMENT, times tokens: f32 [R, M]."""
    M: tl.constexpr = value.shape[1]
    if codes.dtype == tl.uint8:
        pairs = tl.reshape(value, (codes.shape[1], 2, M))
        even, odd = tl.split(tl.permute(pairs, (0, 2, 1)))
        low, high = _scaled_halves(codes, by, less, SPAN, ELEMENT)
        part = tl.dot(low, even, input_precision="ieee")
        part = tl.dot(high, odd, part, input_precision="ieee")
    else:
        w = _scaled_tile(codes, by, less, SPAN, ELEMENT)
        part = tl.dot(w, value, input_precision="ieee")
    return part


@triton.jit
def _tokens_of_codes(
    x,
    x_stride,
    codes,
    scale,
    zero,
    rows,
    tokens,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens of x [T, K] times rows of the weight over this program's part of K: f32 [R, M]. The
    weight is the left operand, decoded in registers; of 4 bits in two halves, each of which meets
    every other column of x.
    """
    ELEMENT: tl.constexpr = x.dtype.element_ty
    PER_BYTE: tl.constexpr = 2 if codes.dtype.element_ty == tl.uint8 else 1
    BYTES: tl.constexpr = BLOCK_K // PER_BYTE
    SPAN: tl.constexpr = SHARED if SHARED < BLOCK_K else BLOCK_K
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    R: tl.constexpr = rows.shape[0]
    M: tl.constexpr = tokens.shape[0]
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * BYTES
    LAST: tl.constexpr = (K + PER_BYTE - 1) // PER_BYTE
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * SHARE if SPLITS > 1 else 0
    end = tl.minimum(begin + SHARE, LAST) if SPLITS > 1 else LAST
    code_rows = codes + rows.to(tl.int64)[:, None] * WIDTH
    scales = _shared_rows(scale, rows, ROWS, GROUPS)
    zeros = None if zero is None else _shared_rows(zero, rows, ROWS, GROUPS)
    x_rows = x + tokens.to(tl.int64)[None, :] * x_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(code_rows, begin, WIDTH, AHEAD)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([R, M], tl.float32)
    for byte in range(begin, end, BYTES):  # in bytes: of these the compiler knows the alignment
        start = byte * PER_BYTE
        tile = _coded(code_rows, byte, WIDTH, BYTES)
        value = _inputs(x_rows, start + k[:, None], K, BLOCK_K)
        by = _of_spans(scales, start, GROUPS, GROUP, SPAN, BLOCK_K // SPAN)
        less = None
        if zeros is not None:
            less = _of_spans(zeros, start, GROUPS, GROUP, SPAN, BLOCK_K // SPAN)
        if SPAN < BLOCK_K:
            part = _of_small_groups(tile, value, by, less, SPAN, ELEMENT)
        else:  # one scale for the tile: its sums are scaled, and no weight is rounded
            part = _of_tile(tile, value, ELEMENT, PDL)
            if less is not None:
                own = tl.sum(value.to(tl.float32), axis=0, keep_dims=True)
                part -= (less - 8.0 if PER_BYTE == 2 else less) * own
            part *= by
        acc += part
    return acc


@triton.jit
def _dequantized(
    q,
    scale,
    zero,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight itself, for products that a library computes. q: [N, WIDTH]; scale and zero:
    [blocks of N, GROUPS]; out: [N, K].
    """
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    SPANS: tl.constexpr = BLOCK_K // SPAN
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * BLOCK_K
    known = tl.minimum(row, N - 1)
    q_rows = q + known.to(tl.int64)[:, None] * WIDTH
    if q.dtype.element_ty == tl.uint8:
        codes = _coded(q_rows, begin // 2, WIDTH, BLOCK_K // 2).to(tl.int32)
        number = tl.interleave((codes & 15).to(tl.float32), (codes >> 4).to(tl.float32))
    else:
        number = _coded(q_rows, begin, WIDTH, BLOCK_K).to(tl.float32)
    spans = tl.reshape(number, (BLOCK_N, SPANS, SPAN))
    if zero is not None:
        zeros = _shared_rows(zero, known, ROWS, GROUPS)
        spans -= _of_spans(zeros, begin, GROUPS, GROUP, SPAN, SPANS)[:, :, None]
    elif MIDDLE is not None:
        spans -= MIDDLE
    scales = _shared_rows(scale, known, ROWS, GROUPS)
    spans *= _of_spans(scales, begin, GROUPS, GROUP, SPAN, SPANS)[:, :, None]
    number = tl.reshape(spans, (BLOCK_N, BLOCK_K))
    k = begin + tl.arange(0, BLOCK_K)
    cells = out + row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(cells, number.to(out.dtype.element_ty), mask=(row < N)[:, None] & (k < K)[None, :])
