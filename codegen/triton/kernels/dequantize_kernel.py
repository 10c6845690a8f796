"""The device side of weights in codes as numbers: what dequantize.py puts into a kernel's text."""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .quant_linear_kernel import _coded, _of_spans, _shared_rows


@triton.jit
def _decode(
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
    # q: [N, WIDTH]; scale, zero: [blocks of N, GROUPS]; out: [N, K]
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
        least = _of_spans(
            _shared_rows(zero, known, ROWS, GROUPS), begin, GROUPS, GROUP, SPAN, SPANS
        )
        spans -= least[:, :, None]
    elif MIDDLE is not None:
        spans -= MIDDLE
    scales = _shared_rows(scale, known, ROWS, GROUPS)
    spans *= _of_spans(scales, begin, GROUPS, GROUP, SPAN, SPANS)[:, :, None]
    number = tl.reshape(spans, (BLOCK_N, BLOCK_K))
    k = begin + tl.arange(0, BLOCK_K)
    cells = out + row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(cells, number.to(out.dtype.element_ty), mask=(row < N)[:, None] & (k < K)[None, :])
