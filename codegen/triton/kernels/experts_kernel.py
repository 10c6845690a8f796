"""The device side of experts: what experts.py puts into a kernel's text.

A pair is a token and one of its slots: ``token * SLOTS + slot``. Rows of weights are the left
operand, so that few pairs of an expert fill an instruction. Whoever loads clamps rows and pairs to
what exists, and whoever stores masks.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ..functions import _gelu, _gelu_tanh, _relu, _sigmoid, _silu
from .experts_order_kernel import _expert_of, _turned
from .linear_kernel import _one_token


@triton.jit
def _tile_of(rows, k, COLUMN: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Elements ``k`` of rows, COLUMN apart."""
    if K % BLOCK_K == 0:
        return tl.load(rows + k * COLUMN)
    return tl.load(rows + k * COLUMN, mask=k < K, other=0.0)


@triton.jit
def _within(index, N: tl.constexpr, BLOCK: tl.constexpr):
    """An index below N. Blocks that fill N are left alone: where rows are neighbours in memory,
    Triton has to see it.
    """
    if N % BLOCK == 0:
        return index
    return tl.minimum(index, N - 1)


@triton.jit
def _sums(rows, x_rows, COLUMN: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of weights times rows of x: f32 [R, M]."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([rows.shape[0], x_rows.shape[0]], tl.float32)
    for start in range(0, K, BLOCK_K):
        w = _tile_of(rows[:, None], start + k[None, :], COLUMN, K, BLOCK_K)
        value = _tile_of(x_rows[None, :], start + k[:, None], 1, K, BLOCK_K)
        acc = tl.dot(w, value, acc, input_precision="ieee")
    return acc


@triton.jit
def _pairs_of_sums(
    rows, apart, x_rows, COLUMN: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``_sums`` of rows, and of those ``apart`` elements behind them."""
    k = tl.arange(0, BLOCK_K)
    first = tl.zeros([rows.shape[0], x_rows.shape[0]], tl.float32)
    second = first
    for start in range(0, K, BLOCK_K):
        a = _tile_of(rows[:, None], start + k[None, :], COLUMN, K, BLOCK_K)
        b = _tile_of(rows[:, None] + apart, start + k[None, :], COLUMN, K, BLOCK_K)
        value = _tile_of(x_rows[None, :], start + k[:, None], 1, K, BLOCK_K)
        first = tl.dot(a, value, first, input_precision="ieee")
        second = tl.dot(b, value, second, input_precision="ieee")
    return first, second


@triton.jit
def _activated(
    gate, up,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What an expert hands to ``down``, as the op defines it, in float32."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if ALPHA is not None:
        return gate * _sigmoid(gate * ALPHA, NATIVE) * (up + 1.0)
    if ACTIVATION == "silu":
        return _silu(gate, NATIVE) * up
    if ACTIVATION == "gelu":
        return _gelu(gate) * up
    if ACTIVATION == "gelu_tanh":
        return _gelu_tanh(gate, NATIVE) * up
    if ACTIVATION == "relu":
        return _relu(gate) * up
    return _sigmoid(gate, NATIVE) * up


@triton.jit
def _gate_up(
    x,
    order,
    turns,
    gate_up,
    gate_up_bias,
    hidden,
    tokens,
    X_OFFSET: tl.constexpr,
    X_ROW: tl.constexpr,
    W_OFFSET: tl.constexpr,
    W_EXPERT: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of an expert's pairs through a block of its gates and ups, to ``hidden`` [pairs, F].
    Halves that alternate are one product, which is split: so its tiles of weights lie in one piece.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pairs = tokens * SLOTS
    BLOCKS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    turn = tl.load(turns + tl.program_id(0) // BLOCKS)
    if turn >= 0:
        expert, tile, block = _turned(turn, tl.program_id(0), BLOCKS)
        expert = expert.to(tl.int64)
        pair = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        token = (tl.minimum(pair, pairs - 1) // SLOTS).to(tl.int64)
        x_rows = x + X_OFFSET + token * X_ROW
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        weights = gate_up + W_OFFSET + expert * W_EXPERT
        if INTERLEAVED:
            both = block * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
            row = _within(both, 2 * F, 2 * BLOCK_N)
            acc = _sums(weights + row * W_ROW, x_rows, W_COLUMN, K, BLOCK_K)
            if gate_up_bias is not None:
                acc += tl.load(gate_up_bias + expert * (2 * F) + row).to(tl.float32)[:, None]
            halves = tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1))
            gate, up = tl.split(halves)
        else:
            row = _within(column, F, BLOCK_N)
            rows = weights + row * W_ROW
            gate, up = _pairs_of_sums(rows, F * W_ROW, x_rows, W_COLUMN, K, BLOCK_K)
            if gate_up_bias is not None:
                bias = gate_up_bias + expert * (2 * F) + row
                gate += tl.load(bias).to(tl.float32)[:, None]
                up += tl.load(bias + F).to(tl.float32)[:, None]
        value = _activated(gate, up, ACTIVATION, LIMIT, ALPHA, NATIVE)
        there = (column[:, None] < F) & (pair[None, :] < pairs)
        at = hidden + pair.to(tl.int64)[None, :] * F + column[:, None]
        tl.store(at, value.to(hidden.dtype.element_ty), mask=there)


@triton.jit
def _down(
    hidden,
    order,
    turns,
    down,
    down_bias,
    results,
    tokens,
    W_OFFSET: tl.constexpr,
    W_EXPERT: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of an expert's pairs through a block of rows of its ``down``, to ``results``
    [pairs, K], rounded as the op's own products are.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pairs = tokens * SLOTS
    BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    turn = tl.load(turns + tl.program_id(0) // BLOCKS)
    if turn >= 0:
        expert, tile, block = _turned(turn, tl.program_id(0), BLOCKS)
        expert = expert.to(tl.int64)
        pair = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        hidden_rows = hidden + tl.minimum(pair, pairs - 1).to(tl.int64) * F
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row = _within(column, K, BLOCK_N)
        rows = down + W_OFFSET + expert * W_EXPERT + row * W_ROW
        acc = _sums(rows, hidden_rows, W_COLUMN, F, BLOCK_K)
        if down_bias is not None:
            acc += tl.load(down_bias + expert * K + row).to(tl.float32)[:, None]
        there = (column[:, None] < K) & (pair[None, :] < pairs)
        at = results + pair.to(tl.int64)[None, :] * K + column[:, None]
        tl.store(at, acc.to(results.dtype.element_ty), mask=there)


@triton.jit
def _weighted(
    results,
    places,
    weights,
    out,
    WEIGHTS_OFFSET: tl.constexpr,
    WEIGHTS_ROW: tl.constexpr,
    WEIGHTS_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sum of a token's results times its weights, slot by slot in float32. Results stand in
    the order of pairs, or at their ``places``.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for slot in tl.static_range(SLOTS):
        weight = tl.load(weights + WEIGHTS_OFFSET + token * WEIGHTS_ROW + slot * WEIGHTS_COLUMN)
        row = token * SLOTS + slot
        if places is not None:
            row = tl.load(places + row).to(tl.int64)
        value = tl.load(results + row * K + column, mask=column < K, other=0.0)
        acc += value.to(tl.float32) * weight.to(tl.float32)
    tl.store(out + token * K + column, acc.to(out.dtype.element_ty), mask=column < K)


@triton.jit
def _gate_up_rows(
    x,
    ids,
    gate_up,
    gate_up_bias,
    hidden,
    IDS_OFFSET: tl.constexpr,
    IDS_ROW: tl.constexpr,
    IDS_COLUMN: tl.constexpr,
    X_OFFSET: tl.constexpr,
    X_ROW: tl.constexpr,
    W_OFFSET: tl.constexpr,
    W_EXPERT: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One pair through BLOCK_N gates and ups of its expert, dense rows, in FMA units."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1)
    expert = _expert_of(ids, pair, IDS_OFFSET, IDS_ROW, IDS_COLUMN, SLOTS, E).to(tl.int64)
    both = tl.arange(0, 2 * BLOCK_N)  # a row of each half in turn, to be split again
    column = tl.minimum(tl.program_id(0) * BLOCK_N + both // 2, F - 1)
    row = column * 2 + both % 2 if INTERLEAVED else column + both % 2 * F
    x_row = x + X_OFFSET + (pair // SLOTS).to(tl.int64) * X_ROW
    weights = gate_up + W_OFFSET + expert * W_EXPERT
    acc = _one_token(x_row, None, weights, row, K, False, 0.0, BLOCK_K, False)
    if gate_up_bias is not None:
        acc += tl.load(gate_up_bias + expert * (2 * F) + row).to(tl.float32)[:, None]
    gate, up = tl.split(tl.reshape(acc, (BLOCK_N, 2)))
    value = _activated(gate, up, ACTIVATION, LIMIT, ALPHA, NATIVE)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = hidden + pair.to(tl.int64) * F + column
    tl.store(at, value.to(hidden.dtype.element_ty), mask=column < F)


@triton.jit
def _down_rows(
    hidden,
    ids,
    weights,
    down,
    down_bias,
    out,
    IDS_OFFSET: tl.constexpr,
    IDS_ROW: tl.constexpr,
    IDS_COLUMN: tl.constexpr,
    WEIGHTS_OFFSET: tl.constexpr,
    WEIGHTS_ROW: tl.constexpr,
    WEIGHTS_COLUMN: tl.constexpr,
    W_OFFSET: tl.constexpr,
    W_EXPERT: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """All slots of one token through BLOCK_N dense rows of their experts' ``down``, and their
    weighted sum.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(column, K - 1)
    total = tl.zeros([BLOCK_N, 1], tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = _expert_of(ids, pair, IDS_OFFSET, IDS_ROW, IDS_COLUMN, SLOTS, E).to(tl.int64)
        matrix = down + W_OFFSET + expert * W_EXPERT
        x_row = hidden + pair.to(tl.int64) * F
        acc = _one_token(x_row, None, matrix, row, F, False, 0.0, BLOCK_K, False)
        if down_bias is not None:
            acc += tl.load(down_bias + expert * K + row).to(tl.float32)[:, None]
        at = weights + WEIGHTS_OFFSET + token.to(tl.int64) * WEIGHTS_ROW + slot * WEIGHTS_COLUMN
        total += acc * tl.load(at).to(tl.float32)
    at = out + token.to(tl.int64) * K + column[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=column[:, None] < K)
