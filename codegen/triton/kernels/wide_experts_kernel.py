"""The device side of experts of many pairs each: what wide_experts.py puts into a kernel's text.

Tiles come by descriptors, which fill what lies beyond an end with zeros. Rows stand in the order of
their experts, each expert's from the start of a tile on: the rest of its last tile holds anything,
stays in its rows, and is read by no one.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from .experts_kernel import _activated
from .experts_order_kernel import _most_tiles, _turned
from .wide_linear_kernel import _gather, _leave, _piece, _share


@triton.jit
def _spread(
    x,
    places,
    sorted_x,
    X_OFFSET: tl.constexpr,
    X_ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token's row of x to the place of each of its pairs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(x + X_OFFSET + token * X_ROW + column, mask=column < K, other=0.0)
    for slot in tl.static_range(SLOTS):
        place = tl.load(places + token * SLOTS + slot).to(tl.int64)
        tl.store(sorted_x + place * K + column, value, mask=column < K)


@triton.jit
def _wide_sums(
    rows, weights, row, matrix, column, begin, end,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of rows times rows of weights, over the steps from ``begin`` to ``end``: those from
    ``column`` on of as many matrices from ``matrix`` on as a block of the descriptor has, ROWS in
    all. f32 [BLOCK_M, ROWS], one operand and one sum of the tensor cores.
    """
    acc = tl.zeros([BLOCK_M, ROWS], tl.float32)
    for step in range(begin, end):
        left = rows.load([row, step * BLOCK_K])
        right = tl.reshape(weights.load([matrix, column, step * BLOCK_K]), (ROWS, BLOCK_K))
        acc = tl.dot(left, tl.trans(right), acc)
    return acc


@triton.jit
def _wide_gate_up(
    x,
    turns,
    gate_up,
    gate_up_bias,
    hidden,
    tokens,
    W_OFFSET: tl.constexpr,
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
    PROGRAMS: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """All tiles of rows through all blocks of their experts' gates and ups, to ``hidden``
    [rows, F]. Gates and ups that are halves are two matrices, [2 E, F, K]; else one, [E, 2 F, K].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    MATRICES: tl.constexpr = 1 if INTERLEAVED else 2
    OUTPUTS: tl.constexpr = 2 * F // MATRICES  # of a matrix
    EACH: tl.constexpr = 2 * BLOCK_N // MATRICES  # of which a tile has so many
    BLOCKS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    most = _most_tiles(tokens * SLOTS, E, BLOCK_M)
    rows = tl.make_tensor_descriptor(x, [most * BLOCK_M, K], [K, 1], [BLOCK_M, BLOCK_K])
    weights = tl.make_tensor_descriptor(
        gate_up + W_OFFSET, [E * MATRICES, OUTPUTS, K], [OUTPUTS * K, K, 1],
        [MATRICES, EACH, BLOCK_K],
    )  # fmt: skip
    values = tl.make_tensor_descriptor(hidden, [most * BLOCK_M, F], [F, 1], [BLOCK_M, BLOCK_N])
    count = tl.load(turns + most)
    for index in tl.range(tl.program_id(0), count * BLOCKS, PROGRAMS, flatten=FLAT):
        expert, tile, block = _turned(tl.load(turns + index // BLOCKS), index, BLOCKS)
        first = block * EACH
        acc = _wide_sums(
            rows, weights, tile * BLOCK_M, expert * MATRICES, first,
            0, (K + BLOCK_K - 1) // BLOCK_K, BLOCK_M, 2 * BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if gate_up_bias is not None:
            both = tl.arange(0, 2 * BLOCK_N)
            output = tl.minimum(first + both % EACH, OUTPUTS - 1) + both // EACH * OUTPUTS
            bias = tl.load(gate_up_bias + expert * (2 * F) + output)
            acc += bias.to(tl.float32)[None, :]
        if INTERLEAVED:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
        else:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        value = _activated(gate, up, ACTIVATION, LIMIT, ALPHA, NATIVE)
        values.store([tile * BLOCK_M, block * BLOCK_N], value.to(hidden.dtype.element_ty))


@triton.jit
def _wide_down(
    hidden,
    turns,
    down,
    down_bias,
    results,
    tokens,
    W_OFFSET: tl.constexpr,
    W_EXPERT: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """All tiles of rows through all blocks of their experts' ``down``, to ``results`` [rows, K],
    rounded as the op's own products are.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    most = _most_tiles(tokens * SLOTS, E, BLOCK_M)
    rows = tl.make_tensor_descriptor(hidden, [most * BLOCK_M, F], [F, 1], [BLOCK_M, BLOCK_K])
    weights = tl.make_tensor_descriptor(
        down + W_OFFSET, [E, K, F], [W_EXPERT, F, 1], [1, BLOCK_N, BLOCK_K]
    )
    values = tl.make_tensor_descriptor(results, [most * BLOCK_M, K], [K, 1], [BLOCK_M, BLOCK_N])
    count = tl.load(turns + most)
    for index in tl.range(tl.program_id(0), count * BLOCKS, PROGRAMS, flatten=FLAT):
        from_behind = count * BLOCKS - 1 - index  # what gate_up gave last is in the L2 still
        turn = tl.load(turns + from_behind // BLOCKS)
        expert, tile, block = _turned(turn, from_behind, BLOCKS)
        first = block * BLOCK_N
        acc = _wide_sums(
            rows, weights, tile * BLOCK_M, expert, first,
            0, (F + BLOCK_K - 1) // BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if down_bias is not None:
            output = tl.minimum(first + tl.arange(0, BLOCK_N), K - 1)
            acc += tl.load(down_bias + expert * K + output).to(tl.float32)[None, :]
        values.store([tile * BLOCK_M, first], acc.to(results.dtype.element_ty))


@triton.jit
def _wide_down_shared(
    hidden,
    turns,
    down,
    down_bias,
    results,
    partial,
    counters,
    tokens,
    W_OFFSET: tl.constexpr,
    W_EXPERT: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As ``_wide_down``; the steps of tiles that do not fill whole rounds of programs are dealt out
    evenly, and who has a tile's first ones adds up what others leave.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    most = _most_tiles(tokens * SLOTS, E, BLOCK_M)
    rows = tl.make_tensor_descriptor(hidden, [most * BLOCK_M, F], [F, 1], [BLOCK_M, BLOCK_K])
    weights = tl.make_tensor_descriptor(
        down + W_OFFSET, [E, K, F], [W_EXPERT, F, 1], [1, BLOCK_N, BLOCK_K]
    )
    values = tl.make_tensor_descriptor(results, [most * BLOCK_M, K], [K, 1], [BLOCK_M, BLOCK_N])
    count = tl.load(turns + most)
    STEPS: tl.constexpr = (F + BLOCK_K - 1) // BLOCK_K
    tiles = count * BLOCKS
    rounds, start, stop, steps, sharers = _share(tiles, STEPS, PROGRAMS)
    part = sharers - 1 - tl.program_id(0)
    pieces = rounds + tl.cdiv(stop, STEPS) - start // STEPS
    for index in tl.range(0, pieces):
        at, begin, end = _piece(index, rounds, start, stop, STEPS, PROGRAMS)
        expert, tile, block = _turned(tl.load(turns + at // BLOCKS), at, BLOCKS)
        first = block * BLOCK_N
        acc = _wide_sums(
            rows, weights, tile * BLOCK_M, expert, first,
            begin, end, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        own = at - rounds * PROGRAMS
        if begin > 0:
            _leave(acc, partial, counters, own, part)
        else:
            if end < STEPS:
                behind = (own + 1) * STEPS
                acc = _gather(acc, partial, counters, own, behind, part, steps, sharers)
            if down_bias is not None:
                output = tl.minimum(first + tl.arange(0, BLOCK_N), K - 1)
                acc += tl.load(down_bias + expert * K + output).to(tl.float32)[None, :]
            values.store([tile * BLOCK_M, first], acc.to(results.dtype.element_ty))
