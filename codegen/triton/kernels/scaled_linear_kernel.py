"""The device side of products of two operands in codes: what scaled_linear.py puts into a kernel's
text, beside functions of linear_kernel.py and quant_linear_kernel.py.

Rows of x are rounded as ``quantize_rows`` defines it: the largest magnitude of a group of GROUP
columns, 0 for the whole row, becomes the code LARGEST.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ..functions import _by_largest
from .linear_kernel import _inputs, _prefetch, _weights
from .quant_linear_kernel import _shared_rows


@triton.jit
def _rounded(value, scale, LARGEST: tl.constexpr, WHOLE: tl.constexpr, FUSED: tl.constexpr):
    """The codes of float32 values, as float32. FUSED as ``_by_largest`` has it, False for a scale
    that is not of the values' own largest.
    """
    steps = _by_largest(value, scale, FUSED)
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    if WHOLE:  # the sum has no bits for halves: they are rounded to even
        steps = (steps + 12582912.0) - 12582912.0
    return steps


@triton.jit
def _normed_row(
    x,
    norm,
    K: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    STEPWISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [K], or ``rms_norm(x, norm)``, as its element type has it: f32 [BLOCK_K], 0 behind K.
    Waits for what was launched before.
    """
    ELEMENT: tl.constexpr = x.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if norm is not None:
        weight = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + EPS)
        if STEPWISE:
            value = value.to(ELEMENT).to(tl.float32)
        if norm is not None:
            value *= weight
        value = value.to(ELEMENT).to(tl.float32)
    return value


@triton.jit
def _group_scales(groups, LARGEST: tl.constexpr):
    """The scale of each row of ``groups``, [R, 1]: NaN where a number of it is not finite, so that
    all products with the group are.
    """
    size = tl.where(groups != groups, float("inf"), tl.abs(groups))
    scale = tl.div_rn(tl.max(size, axis=1, keep_dims=True), LARGEST)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(scale == float("inf"), float("nan"), scale)


@triton.jit
def _round_rows(
    x,
    norm,
    static,
    out,
    scales,
    x_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    STEPWISE: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program, of ``rms_norm(x, norm)`` where there is one: its codes to ``out`` [T, K],
    with their scales to ``scales``; or, where ``out`` is float32, what both stand for.
    """
    ACROSS: tl.constexpr = BLOCK_K if GROUP == 0 else GROUP
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    PARTS: tl.constexpr = BLOCK_K // ACROSS
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    value = _normed_row(x + row * x_stride, norm, K, NORM, EPS, STEPWISE, BLOCK_K, PDL)
    groups = tl.reshape(value, (PARTS, ACROSS))
    if static is not None:
        scale = tl.zeros([PARTS, 1], tl.float32) + tl.load(static).to(tl.float32)
    else:
        scale = _group_scales(groups, LARGEST)
    codes = _rounded(groups, scale, LARGEST, WHOLE, PDL and static is None)
    if out.dtype.element_ty == tl.float32:
        codes = codes.to(CODES).to(tl.float32) * scale
    else:
        part = tl.arange(0, PARTS)[:, None]
        tl.store(scales + row * GROUPS + part, scale, mask=part < GROUPS)
    codes = tl.reshape(codes, (BLOCK_K,)).to(out.dtype.element_ty)
    tl.store(out + row * K + k, codes, mask=k < K)


@triton.jit
def _tokens_of_both(
    x,
    x_scale,
    codes,
    scale,
    rows,
    tokens,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens of codes x [T, K] times rows of codes over this program's part of K: f32 [R, M].

    The weight is the left operand. Where columns have groups, a step lies within one of them and is
    scaled by itself. Sums of int8 are exact in int32; those of e4m3 are handed from the tensor
    cores, which keep some 14 bits of a sum, to float32 every CHAIN columns.
    """
    R: tl.constexpr = rows.shape[0]
    M: tl.constexpr = tokens.shape[0]
    WHOLE: tl.constexpr = codes.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if WHOLE else tl.float32
    CHAIN: tl.constexpr = 0 if WHOLE else BLOCK_K if BLOCK_K < 128 else 128
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * BLOCK_K
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * SHARE if SPLITS > 1 else 0
    end = tl.minimum(begin + SHARE, K) if SPLITS > 1 else K
    w_rows = codes + rows.to(tl.int64)[:, None] * K
    x_rows = x + tokens.to(tl.int64)[None, :] * K
    w_scales = _shared_rows(scale, rows, ROWS, GROUPS)
    x_scales = x_scale + tokens.to(tl.int64)[None, :] * GROUPS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(w_rows, begin, K, AHEAD)
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([R, M], tl.float32)
    acc = tl.zeros([R, M], SUM)
    for start in range(begin, end, BLOCK_K):
        w = _weights(w_rows, start + k[None, :], K, BLOCK_K)
        value = _inputs(x_rows, start + k[:, None], K, BLOCK_K)
        if GROUP == 0:
            acc = tl.dot(w, value, acc, max_num_imprecise_acc=CHAIN, out_dtype=SUM)
        else:
            group = start // GROUP
            part = tl.dot(w, value, max_num_imprecise_acc=CHAIN, out_dtype=SUM).to(tl.float32)
            by = tl.load(w_scales + group).to(tl.float32) * tl.load(x_scales + group)
            total += part * by
    if GROUP == 0:
        total = acc.to(tl.float32) * (tl.load(w_scales).to(tl.float32) * tl.load(x_scales))
    return total
