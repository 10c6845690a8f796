"""The device side of sample: what sample.py puts into a kernel's text.

A logit's key is an integer in the order of logits: a float32's bits, without those (SHIFT) that the
element type does not have. Cuts are found on keys. ``source`` is a row of logits, or the list of
those of its elements that may survive the cuts; both end at a multiple of VEC.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """The key of a float32; equal for -0 and 0."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key) >> SHIFT


@triton.jit
def _least_key(x, SHIFT: tl.constexpr):
    """The least key of logits that are not below x, a float64."""
    near = x.to(tl.float32)
    key = _key(near, 0) + (near.to(tl.float64) < x).to(tl.int32)
    # A positive key has zeros in the bits that are cut off, a negative one has ones.
    return (key + tl.where(key > 0, (1 << SHIFT) - 1, 0)) >> SHIFT


@triton.jit
def _scale(temperature):
    """What a difference of logits is multiplied by to be an exponent of 2."""
    return (1.4426950408889634 / tl.maximum(temperature, 1e-30).to(tl.float64)).to(tl.float32)


@triton.jit
def _chunk(
    logits,
    temperature,
    chunk_max,
    chunk_first,
    chunk_mass,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one chunk of a row: its largest logit (NaN if any is), the first token that has it, and
    the sum of probabilities relative to that token's.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    infinity: tl.constexpr = float("inf")
    x = tl.load(logits + row * STRIDE + tokens, mask=tokens < V, other=-infinity).to(tl.float32)
    scale = _scale(tl.load(temperature + row))
    best = tl.max(x, 0)
    nans = tl.max((x != x).to(tl.int32), 0)
    first = tl.min(tl.where(x == best, tokens, V), 0)
    relative = tl.where(x > -infinity, x - best, -infinity)
    mass = tl.sum(tl.where(x > -infinity, tl.exp2(relative * scale), 0.0), 0)
    at = row * CHUNKS + chunk
    tl.store(chunk_max + at, tl.where(nans > 0, float("nan"), best))
    tl.store(chunk_first + at, first)
    tl.store(chunk_mass + at, mass)


@triton.jit
def _load(source, start, count, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Elements from ``start`` on, as float32, and which of them there are."""
    offsets = start + tl.arange(0, BLOCK)
    # Rounded up, so that VEC elements come in one load, in spite of the mask.
    end = (count + VEC - 1) // VEC * VEC
    x = tl.load(source + offsets, mask=offsets < end, other=0.0).to(tl.float32)
    return x, offsets < count


@triton.jit
def _keys(x, there, SHIFT: tl.constexpr):
    """Keys, the least integer where there is no element."""
    return tl.where(there, _key(x, SHIFT), -2147483648)


@triton.jit
def _select(
    source,
    count,
    goal,
    low,
    top,
    best,
    scale,
    COUNTS: tl.constexpr,
    SHIFT: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The largest key from ``low`` to ``top`` such that the elements not below it are ``goal`` or
    more (COUNTS), or have as much mass; ``low`` if there is none. Each pass over the elements cuts
    the range to a quarter.
    """
    high = top.to(tl.int64) + 1
    low = low.to(tl.int64)
    while high - low > 1:
        step = (high - low + 3) >> 2
        first = low.to(tl.int32)
        quarter = step.to(tl.int32)
        # Sums of what a thread holds: threads meet once a pass.
        sum_1 = tl.zeros([BLOCK], tl.float32)
        sum_2 = tl.zeros([BLOCK], tl.float32)
        sum_3 = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, count, BLOCK, num_stages=STAGES):
            x, there = _load(source, start, count, VEC, BLOCK)
            key = _keys(x, there, SHIFT)
            weight = 1.0 if COUNTS else tl.exp2((x - best) * scale)
            sum_1 += tl.where(key >= first + quarter, weight, 0.0)
            sum_2 += tl.where(key >= first + 2 * quarter, weight, 0.0)
            sum_3 += tl.where(key >= first + 3 * quarter, weight, 0.0)
        reached = (tl.sum(sum_1, 0) >= goal).to(tl.int64)
        reached += (tl.sum(sum_2, 0) >= goal).to(tl.int64)
        reached += (tl.sum(sum_3, 0) >= goal).to(tl.int64)
        low += reached * step
        high = tl.minimum(high, low + step)
    return low.to(tl.int32)


@triton.jit
def _listed(
    row,
    lowest,
    list_logits,
    list_tokens,
    V: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHIFT: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the elements from the key ``lowest`` on into the list, in order, and gives their
    number; it stops at the first block that CAPACITY does not hold.
    """
    count = 0
    start = 0
    next_x, next_there = _load(row, 0, V, VEC, BLOCK)
    while (start < V) & (count <= CAPACITY):
        x, there = next_x, next_there
        next_x, next_there = _load(row, start + BLOCK, V, VEC, BLOCK)
        keep = _keys(x, there, SHIFT) >= lowest
        found = tl.sum(keep.to(tl.int32), 0)
        if found > 0:
            at = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            keep = keep & (at < CAPACITY)
            tl.store(list_logits + at, x.to(list_logits.dtype.element_ty), mask=keep)
            tl.store(list_tokens + at, start + tl.arange(0, BLOCK), mask=keep)
        count += found
        start += BLOCK
    tl.debug_barrier()  # what one thread wrote, others read
    return count


@triton.jit
def _masses(
    source,
    count,
    lowest,
    best,
    scale,
    SLOTS: tl.constexpr,
    SHIFT: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The mass of each block's elements from the key ``lowest`` on."""
    slots = tl.arange(0, SLOTS)
    masses = tl.zeros([SLOTS], tl.float32)
    for start in tl.range(0, count, BLOCK, num_stages=STAGES):
        x, there = _load(source, start, count, VEC, BLOCK)
        keep = _keys(x, there, SHIFT) >= lowest
        mass = tl.sum(tl.where(keep, tl.exp2((x - best) * scale), 0.0), 0)
        masses = tl.where(slots == start // BLOCK, mass, masses)
    return masses


@triton.jit
def _invert(
    source,
    count,
    lowest,
    best,
    scale,
    uniform,
    masses,
    SLOTS: tl.constexpr,
    SHIFT: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first element whose mass, added to that of those before it, exceeds ``uniform`` of all.
    Rounding never leads to an element that is cut, nor past the last one.
    """
    slots = tl.arange(0, SLOTS)
    wide = masses.to(tl.float64)
    reached = tl.cumsum(wide, 0)
    goal = uniform.to(tl.float64) * tl.sum(wide, 0)
    last = tl.max(tl.where(masses > 0, slots, 0), 0)
    slot = tl.min(tl.where((reached > goal) & (masses > 0), slots, last), 0)
    goal -= tl.sum(tl.where(slots < slot, wide, 0.0), 0)

    x, there = _load(source, slot * BLOCK, count, VEC, BLOCK)
    keep = _keys(x, there, SHIFT) >= lowest
    weight = tl.where(keep, tl.exp2((x - best) * scale), 0.0)
    places = tl.arange(0, BLOCK)
    last = tl.max(tl.where(weight > 0, places, 0), 0)
    over = (tl.cumsum(weight, 0) > goal.to(tl.float32)) & (weight > 0)
    return slot * BLOCK + tl.min(tl.where(over, places, last), 0)


@triton.jit
def _random(
    row,
    chunk_max,
    list_logits,
    list_tokens,
    maxima,
    masses,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHIFT: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A token of a row whose largest logit is finite, drawn; ``maxima`` and ``masses`` are of its
    chunks, relative to their own maxima.
    """
    scale = _scale(temperature)
    infinity: tl.constexpr = float("inf")
    share = tl.where(masses > 0, tl.exp2((maxima - best) * scale), 0.0)
    # Less than 2^-100 of the likeliest would be chosen, yet have no element that is more than 0.
    masses = tl.where(share > 7.888609052210118e-31, masses * share, 0.0)
    lowest = _key(tl.full([], -infinity, tl.float32), SHIFT) + 1
    top = _key(best, SHIFT)
    wide_best = best.to(tl.float64)
    heat = tl.maximum(temperature, 1e-30).to(tl.float64)
    relative = lowest
    if min_p > 0:
        least = wide_best + heat * tl.log(tl.minimum(min_p, 1.0).to(tl.float64))
        relative = tl.maximum(lowest, _least_key(least, SHIFT))
    counted = (top_k > 0) & (top_k < V)
    nucleus = top_p < 1

    if counted | nucleus:
        total = tl.sum(masses.to(tl.float64), 0)
        rest = 1.0 - tl.maximum(top_p, 0.0).to(tl.float64)
        bound = relative
        if counted:
            # The k-th largest logit is no less than the k-th largest maximum of chunks.
            chunks = tl.arange(0, CHUNK_SLOTS)
            others = tl.load(chunk_max + chunks, mask=chunks < CHUNKS, other=-infinity)
            larger = tl.sum((others[None, :] > maxima[:, None]).to(tl.int32), 1)
            kth = tl.min(tl.where(larger < top_k, maxima, best), 0)
            bound = tl.where(top_k <= CHUNKS, tl.maximum(_key(kth, SHIFT), lowest), lowest)
            if not nucleus:
                bound = tl.maximum(bound, relative)
        else:
            # All logits below this one together have less than what the nucleus leaves out.
            least = wide_best + heat * tl.log(tl.maximum(rest, 1e-9) * total / V)
            bound = tl.minimum(tl.maximum(bound, _least_key(least, SHIFT)), top)
        # In 32 bits a block's logits, places and addresses would not stay in registers.
        PART: tl.constexpr = BLOCK // 2 if SHIFT == 0 else BLOCK
        count = _listed(row, bound, list_logits, list_tokens, V, CAPACITY, SHIFT, VEC, PART)
        listed = count <= CAPACITY
        source = row
        count = tl.where(listed, count, V)
        if listed:
            source = list_logits
        if counted:
            goal = top_k.to(tl.float32)
            bound = _select(
                source, count, goal, bound, top, best, scale, True, SHIFT, VEC, BLOCK, STAGES
            )
        if nucleus:
            if counted:
                kept = _masses(source, count, bound, best, scale, SLOTS, SHIFT, VEC, BLOCK, STAGES)
                total = tl.sum(kept.to(tl.float64), 0)
            goal = tl.maximum((total * (1.0 - rest)).to(tl.float32), 1e-30)
            bound = _select(
                source, count, goal, bound, top, best, scale, False, SHIFT, VEC, BLOCK, STAGES
            )
        bound = tl.maximum(bound, relative)
        kept = _masses(source, count, bound, best, scale, SLOTS, SHIFT, VEC, BLOCK, STAGES)
        place = _invert(source, count, bound, best, scale, uniform, kept, SLOTS, SHIFT, VEC, BLOCK)
        token = place
        if listed:
            token = tl.load(list_tokens + place)
    elif min_p > 0:
        kept = _masses(row, V, relative, best, scale, SLOTS, SHIFT, VEC, BLOCK, STAGES)
        token = _invert(row, V, relative, best, scale, uniform, kept, SLOTS, SHIFT, VEC, BLOCK)
    else:
        token = _invert(
            row, V, lowest, best, scale, uniform, masses, CHUNK_SLOTS, SHIFT, VEC, CHUNK
        )
    return token


@triton.jit
def _choose(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    tokens,
    chunk_max,
    chunk_first,
    chunk_mass,
    list_logits,
    list_tokens,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHIFT: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token of one row, from what its chunks have."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    infinity: tl.constexpr = float("inf")
    chunks = tl.arange(0, CHUNK_SLOTS)
    there = chunks < CHUNKS
    at = row * CHUNKS + chunks
    maxima = tl.load(chunk_max + at, mask=there, other=-infinity)
    firsts = tl.load(chunk_first + at, mask=there, other=V)
    masses = tl.load(chunk_mass + at, mask=there, other=0.0)
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    drawn = tl.load(uniform + row)

    best = tl.max(maxima, 0)
    nans = tl.max((maxima != maxima).to(tl.int32), 0)
    token = tl.min(tl.where(maxima == best, firsts, V), 0)
    valid = (nans == 0) & (best < infinity) & (best > -infinity)
    if valid & (heat > 0):
        drawn = tl.where(drawn > 0, tl.minimum(drawn, 0.9999999403953552), 0.0)
        token = _random(
            logits + row * STRIDE,
            chunk_max + row * CHUNKS,
            list_logits + row * CAPACITY,
            list_tokens + row * CAPACITY,
            maxima,
            masses,
            best,
            heat,
            k,
            p,
            least,
            drawn,
            V,
            CHUNKS,
            CAPACITY,
            SHIFT,
            VEC,
            CHUNK,
            BLOCK,
            CHUNK_SLOTS,
            SLOTS,
            STAGES,
        )
    tl.store(tokens + row, tl.where(valid, token, -1).to(tl.int64))
