"""The device side of decode linears: what linear.py puts into a kernel's text.

``rows`` are rows of the weight [N, K], ``tokens`` those of x. Both come clamped to what exists, so
that nothing is masked along them; whoever stores masks.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _weights(rows, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of weights [R, BLOCK_K]; they are read once, so others' data stays in the cache.
    Quantized weights are decoded here.
    """
    if K % BLOCK_K == 0:
        return tl.load(rows + k, eviction_policy="evict_first")
    return tl.load(rows + k, mask=k < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Elements of x or of a norm's weight at ``k``."""
    if K % BLOCK_K == 0:
        return tl.load(x + k, eviction_policy="evict_last")
    return tl.load(x + k, mask=k < K, other=0.0, eviction_policy="evict_last")


@triton.jit
def _prefetch(rows, begin, K: tl.constexpr, AHEAD: tl.constexpr):
    """Asks for AHEAD elements of each row, from ``begin`` on, to be brought to L2, a line of 128
    bytes at a time; not beyond the row.
    """
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    lines = rows + tl.minimum(begin + tl.arange(0, AHEAD // LINE)[None, :] * LINE, K - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _one_token(
    x,
    norm,
    weight,
    rows,
    K: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [K] (as ``rms_norm(x, norm)``, where there is one) times rows of the weight: f32 [R, 1].

    All of it runs in FMA units; the norm's scale is common to the row, so it comes last. Two tiles
    of weights are on their way before x is waited for.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    R: tl.constexpr = rows.shape[0]
    k = tl.arange(0, BLOCK_K)
    w_rows = weight + rows.to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = _weights(w_rows, k[None, :], K, BLOCK_K)
    ahead = now
    if STEPS > 1:
        ahead = _weights(w_rows, BLOCK_K + k[None, :], K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([R, BLOCK_K // VECTOR], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        later = ahead
        if step + 2 < STEPS:
            later = _weights(w_rows, (step + 2) * BLOCK_K + k[None, :], K, BLOCK_K)
        at = step * BLOCK_K + k
        value = _inputs(x, at, K, BLOCK_K).to(tl.float32)
        if NORM:
            squares += value * value
            if norm is not None:
                value *= _inputs(norm, at, K, BLOCK_K).to(tl.float32)
        terms = now.to(tl.float32) * value[None, :]
        # Within a thread's own elements first: the others are met once, behind the loop.
        acc += tl.sum(tl.reshape(terms, (R, BLOCK_K // VECTOR, VECTOR)), axis=2)
        now = ahead
        ahead = later
    total = tl.sum(acc, axis=1, keep_dims=True)
    if NORM:
        total *= tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
    return total


@triton.jit
def _sums(squares, tokens, GROUPS: tl.constexpr):
    """Sums of the tokens' rows of squares [T, GROUPS]: f32 [1, M]. A few groups at a time, for a
    program's registers do not hold all of many tokens.
    """
    M: tl.constexpr = tokens.shape[0]
    CHUNK: tl.constexpr = 1024 // M
    group = tl.arange(0, CHUNK)[:, None]
    rows = squares + tokens.to(tl.int64)[None, :] * GROUPS
    total = tl.zeros([CHUNK, M], tl.float32)
    for start in tl.static_range(0, GROUPS, CHUNK):
        total += tl.load(rows + start + group, mask=start + group < GROUPS, other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def _tokens(
    x,
    x_stride,
    weight,
    rows,
    tokens,
    squares,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens of x [T, K] times rows of the weight over this program's part of K: f32 [R, M]; and
    the tokens' sums of squares f32 [1, M], 0 where there are none. The weight is the left operand,
    so that few tokens fill an instruction. The first tile of weights, and AHEAD columns behind it
    as far as the L2, are on their way before x is waited for.
    """
    R: tl.constexpr = rows.shape[0]
    M: tl.constexpr = tokens.shape[0]
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * SHARE if SPLITS > 1 else 0
    end = tl.minimum(begin + SHARE, K) if SPLITS > 1 else K
    w_rows = weight + rows.to(tl.int64)[:, None] * K
    x_rows = x + tokens.to(tl.int64)[None, :] * x_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = _weights(w_rows, begin + k[None, :], K, BLOCK_K)
    if PDL:
        if AHEAD > 0:
            _prefetch(w_rows, begin + BLOCK_K, K, AHEAD)
        tl.extra.cuda.gdc_wait()
    value = _inputs(x_rows, begin + k[:, None], K, BLOCK_K)
    total = tl.zeros([1, M], tl.float32)
    if squares is not None:  # here, so that they come with the first of x, and not behind the last
        total = _sums(squares, tokens, GROUPS)
    acc = tl.dot(w, value, tl.zeros([R, M], tl.float32), input_precision="ieee")
    for start in range(begin + BLOCK_K, end, BLOCK_K):
        w = _weights(w_rows, start + k[None, :], K, BLOCK_K)
        value = _inputs(x_rows, start + k[:, None], K, BLOCK_K)
        acc = tl.dot(w, value, acc, input_precision="ieee")
    return acc, total


@triton.jit
def _gathered(acc, partial, counters, SPLITS: tl.constexpr):
    """The sum of a tile's parts, and whether this program came last and has it.

    Whoever comes last adds all parts up, its own too, in their order: the same bits every time.
    """
    R: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    cells = tl.arange(0, R)[:, None] * M + tl.arange(0, M)[None, :]
    parts = partial + tile.to(tl.int64) * (SPLITS * R * M) + cells
    tl.store(parts + tl.program_id(2) * (R * M), acc)
    tl.debug_barrier()  # all of the tile is written before it is counted
    arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
    last = arrived == SPLITS - 1
    if last:
        acc = tl.zeros([R, M], tl.float32)
        for split in tl.static_range(SPLITS):
            acc += tl.load(parts + split * (R * M), cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return acc, last


@triton.jit
def _hand_on(
    h,
    norm,
    scaled,
    squares,
    column,
    token,
    tokens,
    N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes what ``rms_norm(h, norm)`` in front of the next product needs of a tile of h [R, M]:
    h times the norm's weight, to ``scaled`` [T, N], and the sums of its squares over GROUP columns,
    to ``squares`` [T, N / GROUP].
    """
    R: tl.constexpr = h.shape[0]
    M: tl.constexpr = h.shape[1]
    GROUPS: tl.constexpr = N // GROUP
    row = token.to(tl.int64)
    wide = h.to(tl.float32)
    weight = tl.load(norm + column, mask=column < N, other=0.0).to(tl.float32)
    there = (column < N) & (token < tokens)
    tl.store(scaled + row * N + column, (wide * weight).to(h.dtype), mask=there)
    sums = tl.sum(tl.reshape(wide * wide, (R // GROUP, GROUP, M)), axis=1)
    group = tl.program_id(0) * (R // GROUP) + tl.arange(0, R // GROUP)[:, None]
    there = (group < GROUPS) & (token < tokens)
    tl.store(squares + row * GROUPS + group, sums, mask=there)


@triton.jit
def _normalise(
    x,
    norm,
    out,
    x_stride,
    K: tl.constexpr,
    EPS: tl.constexpr,
    STEPWISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of ``rms_norm(x, norm)`` a program, rounded as the op declares it."""
    ELEMENT: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if norm is not None:
        scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + EPS)
    if STEPWISE:
        value = value.to(ELEMENT).to(tl.float32)
    if norm is not None:
        value *= scale
    tl.store(out + row * K + k, value.to(ELEMENT), mask=k < K)
