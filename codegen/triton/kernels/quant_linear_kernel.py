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
def _raised(codes, SPAN: tl.constexpr):
    """What codes are before they are scaled, too high by ``_excess``: f32 [R, K / SPAN, SPAN].

    An integer that joins the bits of 16, or of 256, is that number plus it, exactly. It costs less
    than a conversion.
    """
    R: tl.constexpr = codes.shape[0]
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.int32)
        low = (((bits & 15) << 19) | 0x41800000).to(tl.float32, bitcast=True)
        high = (((bits & 240) << 15) | 0x41800000).to(tl.float32, bitcast=True)
        spans = tl.reshape(tl.interleave(low, high), (R, 2 * codes.shape[1] // SPAN, SPAN))
    elif codes.dtype == tl.int8:  # the sign's bit, turned over, adds 128
        wide = (((codes.to(tl.int32) & 255) << 15) ^ 0x43C00000).to(tl.float32, bitcast=True)
        spans = tl.reshape(wide, (R, codes.shape[1] // SPAN, SPAN))
    else:
        spans = tl.reshape(codes.to(tl.float32), (R, codes.shape[1] // SPAN, SPAN))
    return spans


@triton.jit
def _excess(zero, kind: tl.constexpr):
    """How far ``_raised`` lies above what codes of that type stand for: their zero points, f32
    [R, SPANS] or one for all, and what made floats of them.
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
        spans = tl.reshape(value, (1, SPANS, SPAN))
        sums = tl.sum(_raised(now, SPAN) * spans, axis=2)
        if CODES.is_int() or zero is not None:  # the sum of x is one for all rows
            sums -= tl.sum(spans, axis=2) * _excess(less, CODES)
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
def _tile(
    code_rows,
    scales,
    zeros,
    byte,
    start,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """A tile [R, BLOCK_K] of the weight from column ``start``, which is at ``byte``, on; rounded
    to the type that it declares, and without its scale where that is one for the row.
    """
    SPANS: tl.constexpr = BLOCK_K // SPAN
    R: tl.constexpr = code_rows.shape[0]
    codes = _coded(code_rows, byte, WIDTH, BYTES)
    less = None
    if zeros is not None:
        less = _of_spans(zeros, start, GROUPS, GROUP, SPAN, SPANS)
    spans = _raised(codes, SPAN)
    raised = _excess(less, codes.dtype)
    if GROUP > 0:
        # What was added leaves with the scale in one step: both are exact in it.
        by = _of_spans(scales, start, GROUPS, GROUP, SPAN, SPANS)
        spans = tl.fma(spans, by[:, :, None], (-raised * by)[:, :, None])
    else:
        spans -= raised if zeros is None else raised[:, :, None]
    return tl.reshape(spans, (R, BLOCK_K)).to(ELEMENT)


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
    weight is the left operand, decoded in registers.
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
        # fmt: off
        w = _tile(
            code_rows, scales, zeros, byte, start, WIDTH, GROUPS, GROUP, SPAN, BYTES, BLOCK_K,
            ELEMENT,
        )
        # fmt: on
        value = _inputs(x_rows, start + k[:, None], K, BLOCK_K)
        acc = tl.dot(w, value, acc, input_precision="ieee")
    if GROUP == 0:
        acc *= tl.load(scales).to(tl.float32)
    return acc
