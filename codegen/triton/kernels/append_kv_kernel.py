"""The device side of append_kv: what append_kv.py puts into a kernel's text.

A program holds some heads of one token, of q, k or v. Pointers come as those of the token's row:
element [head, dim] of ``x`` lies at ``x + head * x_head + dim * x_dim``. A cache of codes has a
scale for each of these rows, which no other part of the program needs to know.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _inside(
    heads, dims, live, HEADS: tl.constexpr, DIMS: tl.constexpr, H: tl.constexpr, D: tl.constexpr
):
    """Which elements of a tile [H, D] there are; one that fills it has no mask when compiled."""
    inside = tl.full([H, D], True, tl.int1)
    if HEADS % H != 0:
        inside = inside & (heads < HEADS)
    if DIMS != D:
        inside = inside & (dims < DIMS)
    if live is not None:
        inside = inside & live
    return inside


@triton.jit
def _step(x, T: tl.constexpr, STEPWISE: tl.constexpr):
    """A step within an op: rounded to the element type where the model rounds there too."""
    return x.to(T).to(x.dtype) if STEPWISE else x


@triton.jit
def _scaled(x, scale, weight, T: tl.constexpr, STEPWISE: tl.constexpr):
    """An element of ``rms_norm``, rounded to its type before what follows."""
    return (_step(x * scale, T, STEPWISE) * weight.to(x.dtype)).to(T).to(x.dtype)


@triton.jit
def _most(largest, nans, tile):
    """The largest magnitude of each row so far, and whether there was a NaN, with one more tile."""
    wide = tile.to(tl.float32)
    largest = tl.maximum(largest, tl.max(tl.abs(wide), axis=1))
    return largest, nans | tl.max((wide != wide).to(tl.int32), axis=1)


@triton.jit
def _row_scale(largest, nans, kind: tl.constexpr):
    """The scale of rows whose largest magnitude this is, f32 [H]: the largest code stands for it.
    A NaN is everyone's in its row.
    """
    scale = tl.div_rn(largest, 127.0 if kind == tl.int8 else 448.0)
    return tl.where(nans > 0, float("nan"), tl.where(scale == 0.0, 1.0, scale))


@triton.jit
def _steps(tile, scale):
    """A tile [H, D] in steps of the least scales of its rows, f32."""
    steps = tl.div_rn(tile.to(tl.float32), tl.broadcast_to(scale[:, None], tile.shape))
    inside = tl.minimum(tl.maximum(steps, -448.0), 448.0)
    return tl.where(steps == steps, inside, steps)


@triton.jit
def _error(steps, TRY: tl.constexpr, kind: tl.constexpr, UNIT: tl.constexpr):
    """The squared error [H] of steps as codes of a larger scale, by factor and inverse, in whole
    units: exact, whatever the order of the sum, and with or without fused multiply-add.
    """
    off = steps - (steps * TRY[1]).to(kind).to(tl.float32) * TRY[0]
    square = off * off * UNIT
    return tl.sum(tl.where(square == square, square, 0.0).to(tl.int32), axis=1)


@triton.jit
def _best_scale(
    scale, low, high, rest, kind: tl.constexpr, TRIES: tl.constexpr, UNIT: tl.constexpr
):
    """The scale [H] of the least error among tries from the least one ``scale`` on, the first of
    these, and the inverse of its factor. Parts of the rows, in steps of ``scale``, may be None.
    """
    factor = tl.full(scale.shape, 1.0, tl.float32)
    inverse = tl.full(scale.shape, 1.0, tl.float32)
    least = tl.full(scale.shape, 2147483647, tl.int32)
    for j in tl.static_range(len(TRIES)):
        error = tl.zeros(scale.shape, tl.int32)
        if low is not None:
            error += _error(low, TRIES[j], kind, UNIT) + _error(high, TRIES[j], kind, UNIT)
        if rest is not None:
            error += _error(rest, TRIES[j], kind, UNIT)
        nearer = error < least
        least = tl.minimum(error, least)
        factor = tl.where(nearer, TRIES[j][0], factor)
        inverse = tl.where(nearer, TRIES[j][1], inverse)
    return scale * factor, inverse


@triton.jit
def _codes_of(tile, scale, kind: tl.constexpr):
    """A tile [H, D] as codes of rows with these scales."""
    LARGEST: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
    steps = tl.div_rn(tile.to(tl.float32), tl.broadcast_to(scale[:, None], tile.shape))
    inside = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    if kind == tl.int8:
        # The sum has no bits behind the point: it is rounded to the nearest integer, half to even.
        codes = tl.where(steps == steps, (inside + 12582912.0) - 12582912.0, 0.0).to(tl.int8)
    else:
        codes = tl.where(steps == steps, inside, steps).to(kind)
    return codes


@triton.jit
def _turn(
    x,
    x_head,
    x_dim,
    out,
    scales,
    live,
    cos,
    cos_dim,
    sin,
    sin_dim,
    weight,
    weight_dim,
    block,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STEPWISE: tl.constexpr,
    EPS: tl.constexpr,
    TRIES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """``out = rope(rms_norm(x))`` for one block of heads, in rows [HEADS, DIM], if ``live``; as
    codes where there are ``scales`` [HEADS] to write.
    """
    ELEMENT: tl.constexpr = x.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    REST: tl.constexpr = DIM - 2 * HALF
    heads = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    rows = x + heads * x_head
    out_rows = out + heads * DIM

    if HALF > 0:
        pairs = tl.arange(0, BLOCK_HALF)[None, :]
        paired = _inside(heads, pairs, None, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            all_pairs = _inside(heads, both, None, HEADS, 2 * HALF, BLOCK_HEADS, 2 * BLOCK_HALF)
            turned = tl.load(rows + both * x_dim, mask=all_pairs, other=0.0)
            a, b = tl.split(tl.reshape(turned, (BLOCK_HEADS, BLOCK_HALF, 2)))
            first, second = 2 * pairs, 2 * pairs + 1
        else:
            a = tl.load(rows + pairs * x_dim, mask=paired, other=0.0)
            b = tl.load(rows + (HALF + pairs) * x_dim, mask=paired, other=0.0)
            first, second = pairs, HALF + pairs
        a, b = a.to(WIDE), b.to(WIDE)
        # The same for all heads, yet loaded for each: a copy of it would go through shared memory.
        c = tl.load(cos + pairs * cos_dim + heads * 0, mask=paired, other=0.0).to(WIDE)
        s = tl.load(sin + pairs * sin_dim + heads * 0, mask=paired, other=0.0).to(WIDE)
    if REST > 0:
        others = tl.arange(0, BLOCK_REST)[None, :]
        other = _inside(heads, others, None, HEADS, REST, BLOCK_HEADS, BLOCK_REST)
        rest = tl.load(rows + (2 * HALF + others) * x_dim, mask=other, other=0.0)

    if weight is not None:
        squares = tl.zeros([BLOCK_HEADS], WIDE)
        if HALF > 0:
            squares += tl.sum(a * a + b * b, axis=1)
        if REST > 0:
            wide = rest.to(WIDE)
            squares += tl.sum(wide * wide, axis=1)
        scale = tl.rsqrt(squares / DIM + EPS)[:, None]
        weights = weight + heads * 0
        if HALF > 0:
            a_weight = tl.load(weights + first * weight_dim, mask=paired, other=0.0)
            b_weight = tl.load(weights + second * weight_dim, mask=paired, other=0.0)
            a = _scaled(a, scale, a_weight, ELEMENT, STEPWISE)
            b = _scaled(b, scale, b_weight, ELEMENT, STEPWISE)
        if REST > 0:
            rest_weight = tl.load(weights + (2 * HALF + others) * weight_dim, mask=other, other=0.0)
            rest = _scaled(wide, scale, rest_weight, ELEMENT, STEPWISE).to(ELEMENT)

    if HALF > 0:
        a_cos, a_sin = _step(a * c, ELEMENT, STEPWISE), _step(a * s, ELEMENT, STEPWISE)
        b_cos, b_sin = _step(b * c, ELEMENT, STEPWISE), _step(b * s, ELEMENT, STEPWISE)
        low, high = (a_cos - b_sin).to(ELEMENT), (b_cos + a_sin).to(ELEMENT)
    if scales is not None:
        KIND: tl.constexpr = out.dtype.element_ty
        largest, nans = tl.zeros([BLOCK_HEADS], tl.float32), tl.zeros([BLOCK_HEADS], tl.int32)
        if HALF > 0:
            largest, nans = _most(largest, nans, low)
            largest, nans = _most(largest, nans, high)
        if REST > 0:
            largest, nans = _most(largest, nans, rest)
        scale = _row_scale(largest, nans, KIND)
        if TRIES is None:
            if HALF > 0:
                low, high = _codes_of(low, scale, KIND), _codes_of(high, scale, KIND)
            if REST > 0:
                rest = _codes_of(rest, scale, KIND)
        else:
            if HALF > 0:
                low, high = _steps(low, scale), _steps(high, scale)
            if REST > 0:
                rest = _steps(rest, scale)
            scale, inverse = _best_scale(
                scale,
                low if HALF > 0 else None,
                high if HALF > 0 else None,
                rest if REST > 0 else None,
                KIND,
                TRIES,
                UNIT,
            )
            if HALF > 0:
                low, high = (low * inverse[:, None]).to(KIND), (high * inverse[:, None]).to(KIND)
            if REST > 0:
                rest = (rest * inverse[:, None]).to(KIND)
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        tl.store(scales + head, scale, mask=(head < HEADS) & live)
    if HALF > 0:
        if INTERLEAVED:
            turned = tl.reshape(tl.join(low, high), (BLOCK_HEADS, 2 * BLOCK_HALF))
            written = _inside(heads, both, live, HEADS, 2 * HALF, BLOCK_HEADS, 2 * BLOCK_HALF)
            tl.store(out_rows + both, turned, mask=written)
        else:
            written = _inside(heads, pairs, live, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)
            tl.store(out_rows + pairs, low, mask=written)
            tl.store(out_rows + (HALF + pairs), high, mask=written)
    if REST > 0:
        written = _inside(heads, others, live, HEADS, REST, BLOCK_HEADS, BLOCK_REST)
        tl.store(out_rows + (2 * HALF + others), rest, mask=written)


@triton.jit
def _append_kv(
    q,
    q_head,
    q_dim,
    q_weight,
    q_weight_dim,
    q_out,
    k,
    k_head,
    k_dim,
    k_weight,
    k_weight_dim,
    k_cache,
    k_scale,
    v,
    v_head,
    v_dim,
    v_cache,
    v_scale,
    cos,
    cos_dim,
    sin,
    sin_dim,
    slot_mapping,
    num_slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STEPWISE: tl.constexpr,
    EPS: tl.constexpr,
    TRIES: tl.constexpr,
    UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """One block of heads of a token: those of q come first, then those of k and those of v."""
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    block = tl.program_id(1)
    if block < Q_BLOCKS:
        if HEADS > 0:
            _turn(
                q,
                q_head,
                q_dim,
                q_out,
                None,
                None,
                cos,
                cos_dim,
                sin,
                sin_dim,
                q_weight,
                q_weight_dim,
                block,
                HEADS,
                DIM,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                INTERLEAVED,
                STEPWISE,
                EPS,
                None,
                1.0,
                BLOCK_HEADS,
            )
    else:
        slot = tl.load(slot_mapping).to(tl.int64)
        # Padding has slots outside the cache, below or above: it is written nowhere.
        live = (slot >= 0) & (slot < num_slots)
        block -= Q_BLOCKS
        if block < KV_BLOCKS:
            _turn(
                k,
                k_head,
                k_dim,
                k_cache + slot * (KV_HEADS * DIM),
                None if k_scale is None else k_scale + slot * KV_HEADS,
                live,
                cos,
                cos_dim,
                sin,
                sin_dim,
                k_weight,
                k_weight_dim,
                block,
                KV_HEADS,
                DIM,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                INTERLEAVED,
                STEPWISE,
                EPS,
                TRIES,
                UNIT,
                BLOCK_HEADS,
            )
        else:
            _turn(
                v,
                v_head,
                v_dim,
                v_cache + slot * (KV_HEADS * VALUE_DIM),
                None if v_scale is None else v_scale + slot * KV_HEADS,
                live,
                None,
                0,
                None,
                0,
                None,
                0,
                block - KV_BLOCKS,
                KV_HEADS,
                VALUE_DIM,
                0,
                1,
                BLOCK_VALUE,
                False,
                False,
                EPS,
                TRIES,
                VALUE_UNIT,
                BLOCK_HEADS,
            )
