"""The device side of the persistent decode kernel: what generate.py puts into its text.

A program's weights come as a stream of chunks [R, BLOCK_K], two of which are in registers or on
their way there at any time, and more on their way to L2 (see the package). A chunk's entry in
``items`` (i64) holds its address, the distance of its rows in units of 8 elements, how many of its
columns there are, and one cell to spare.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _entry(items, item):
    """An entry of the stream: address, distance of rows, columns that there are."""
    cell = items + item * 4
    return tl.load(cell), tl.load(cell + 1).to(tl.int32), tl.load(cell + 2).to(tl.int32)


@triton.jit
def _chunk(base, step, left, R: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):
    """The weights [R, BLOCK_K] of an entry; they are read once, so others' data stays in L2."""
    row = tl.arange(0, R)
    k = tl.arange(0, BLOCK_K)
    start = tl.multiple_of(base.to(tl.pointer_type(tl.bfloat16)), 16)
    cells = start + (row * (step * 8))[:, None] + k[None, :]
    if MASKED:
        there = (k < tl.multiple_of(left, 8))[None, :]
        return tl.load(cells, mask=there, other=0.0, eviction_policy="evict_first")
    return tl.load(cells, eviction_policy="evict_first")


@triton.jit
def _ask(items, item, R: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):
    """Asks for a chunk to be brought to L2, a line of 128 bytes at a time."""
    LINES: tl.constexpr = BLOCK_K // 64
    base, step, left = _entry(items, item)
    row = tl.arange(0, R)
    k = tl.arange(0, LINES) * 64
    if MASKED:
        k = tl.minimum(k, tl.maximum(left - 8, 0))
    start = base.to(tl.pointer_type(tl.bfloat16))
    lines = start + (row * (step * 8))[:, None] + k[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _times(acc, w, x, R: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc f32 [R, BLOCK_K / 8] and the products of a chunk with x f32 [BLOCK_K]: a thread's own
    elements are added first, the others are met once a tile.
    """
    terms = w.to(tl.float32) * x[None, :]
    return acc + tl.sum(tl.reshape(terms, (R, BLOCK_K // 8, 8)), axis=2)


@triton.jit
def _both(acc_a, acc_b):
    """The sums of two groups of rows: f32 [R] each."""
    return tl.split(tl.sum(tl.join(acc_a, acc_b), axis=1))


@triton.jit
def _x(pointer, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Elements of x, or of a norm's weight, from ``start`` on."""
    k = start + tl.arange(0, BLOCK_K)
    cells = tl.multiple_of(pointer.to(tl.pointer_type(tl.bfloat16)), 16) + k
    if K % BLOCK_K == 0:
        return tl.load(cells)
    return tl.load(cells, mask=k < K, other=0.0)


@triton.jit
def _bf16(pointer):
    return pointer.to(tl.pointer_type(tl.bfloat16))


@triton.jit
def _rounded(x):
    """A float32 as bfloat16 has it."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _time(timeline, call, mark: tl.constexpr, CALLS: tl.constexpr, DEVICE: tl.constexpr):
    """Notes the time, in ns: 0 when a call is come to, 1 when it may begin, 2 when it is done."""
    if DEVICE:
        cell = timeline + (tl.program_id(0) * CALLS + call) * 3 + mark
        tl.store(cell, tl.extra.cuda.globaltimer())


@triton.jit
def _time_place(places, DEVICE: tl.constexpr):
    """Notes the multiprocessor that a program is on."""
    if DEVICE:
        place = tl.inline_asm_elementwise(
            "mov.u32 $0, %smid;",
            "=r,r",
            [tl.program_id(0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.store(places + tl.program_id(0), place)


@triton.jit
def _wait(counter, target, limit, diagnosis, call):
    """Waits until a counter has reached its target, modulo 2^32, and returns the limit to wait
    with from here on: after ``limit`` polls it says what it waited for, and nobody of this program
    waits any more, so that the launch ends, with numbers that its caller must not use.
    """
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    polls = 0
    while (seen - target < 0) & (polls < limit):
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        polls += 1
    if seen - target < 0:
        earlier = tl.atomic_add(diagnosis, 1, sem="relaxed", scope="gpu")
        if earlier == 0:
            tl.store(diagnosis + 1, call)
            tl.store(diagnosis + 2, tl.program_id(0))
            tl.store(diagnosis + 3, target)
            tl.store(diagnosis + 4, seen)
        limit = 0
    return limit


@triton.jit
def _arrive(counter):
    """Tells those who wait that all that this program wrote is there."""
    tl.debug_barrier()  # of all its threads
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _begin(
    tile,
    token_ids,
    positions,
    embedding,
    inv_freq,
    h,
    cos,
    sin,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BATCH: tl.constexpr,
):
    """A tile a sequence: the token's row of the embedding [V, WIDTH]. The last one: cos and sin
    [BATCH, HALF] of the positions, rounded as the model's are.
    """
    if tile < BATCH:
        at = tl.arange(0, BLOCK)
        row = _bf16(embedding) + tl.load(token_ids + tile) * WIDTH
        out = _bf16(h) + tile * WIDTH
        tl.store(out + at, tl.load(row + at, mask=at < WIDTH), mask=at < WIDTH)
    else:
        pair = tl.arange(0, BLOCK_HALF)
        there = pair < HALF
        frequency = tl.load(inv_freq + pair, mask=there, other=0.0)
        for sequence in range(BATCH):
            angle = tl.load(positions + sequence).to(tl.float32) * frequency
            tl.store(cos + sequence * HALF + pair, _rounded(tl.cos(angle)), mask=there)
            tl.store(sin + sequence * HALF + pair, _rounded(tl.sin(angle)), mask=there)


@triton.jit
def _step(x, STEPWISE: tl.constexpr):
    """A step within rope: rounded where the model rounds there too."""
    return _rounded(x) if STEPWISE else x


@triton.jit
def _turned(x, head, d, there, cos, sin, D: tl.constexpr, STEPWISE: tl.constexpr):
    """Rope of heads of x [*, D] in halves, bfloat16: [len(head), len(d)]."""
    HALF: tl.constexpr = D // 2
    row = x + head[:, None] * D
    pair = (d % HALF)[None, :]
    own = tl.load(row + d[None, :], mask=there, other=0.0).to(tl.float32)
    other = tl.load(row + ((d + HALF) % D)[None, :], mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + pair)
    s = tl.load(sin + pair)
    sign = tl.where(d < HALF, -1.0, 1.0)[None, :]
    return (_step(own * c, STEPWISE) + sign * _step(other * s, STEPWISE)).to(tl.bfloat16)


@triton.jit
def _attend(
    kv_head,
    split,
    qkv,
    k_cache,
    v_cache,
    cos,
    sin,
    block_table,
    slot,
    length,
    partial_acc,
    partial_max,
    partial_sum,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    FACTOR: tl.constexpr,
    STEPWISE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some of a sequence's keys with the query heads of one KV head: rope, the write into the
    cache by whoever has the newest key, and partial results.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    blocks = (length + BLOCK_N - 1) // BLOCK_N
    share = (blocks + SPLITS - 1) // SPLITS
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    if begin < end:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D)
        n = tl.arange(0, BLOCK_N)
        head = kv_head * GROUP + m
        q = _turned(qkv, head, d, (m < GROUP)[:, None], cos, sin, D, STEPWISE)
        newest = tl.arange(0, 1) + kv_head
        key_row = qkv + HEADS * D
        new_k = _turned(key_row, newest, d, (newest < KV_HEADS)[:, None], cos, sin, D, STEPWISE)
        new_v = tl.load(key_row + (KV_HEADS + newest)[:, None] * D + d[None, :])
        if end == blocks:
            cell = (slot * KV_HEADS + newest)[:, None] * D + d[None, :]
            tl.store(k_cache + cell, new_k)
            tl.store(v_cache + cell, new_v)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        for block in range(begin, end):
            key = block * BLOCK_N + n
            known = key < length - 1
            page = tl.load(block_table + key // PAGE, mask=known, other=0).to(tl.int64)
            cell = ((page * PAGE + key % PAGE) * KV_HEADS + kv_head)[:, None] * D + d[None, :]
            k = tl.load(k_cache + cell, mask=known[:, None], other=0.0)
            v = tl.load(v_cache + cell, mask=known[:, None], other=0.0)
            is_new = (key == length - 1)[:, None]
            k = tl.where(is_new, new_k, k)
            v = tl.where(is_new, new_v, v)
            s = tl.dot(q, tl.trans(k)) * FACTOR
            s = tl.where((key < length)[None, :], s, float("-inf"))
            top = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - top[:, None])
            decay = tl.exp2(row_max - top)
            row_sum = row_sum * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(tl.bfloat16), v, acc * decay[:, None])
            row_max = top
        there = m < GROUP
        part = split * HEADS + head
        tl.store(partial_max + part, row_max, mask=there)
        tl.store(partial_sum + part, row_sum, mask=there)
        tl.store(partial_acc + part[:, None] * D + d[None, :], acc, mask=there[:, None])


@triton.jit
def _merge(
    kv_head,
    length,
    out,
    partial_acc,
    partial_max,
    partial_sum,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The result of one KV head's query heads, of the parts that the splits left."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    blocks = (length + BLOCK_N - 1) // BLOCK_N
    share = (blocks + SPLITS - 1) // SPLITS
    used = (blocks + share - 1) // share
    c = tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)
    head = kv_head * GROUP + c // D
    there = (split < used)[:, None] & (c < GROUP * D)[None, :]
    part = split[:, None] * HEADS + head[None, :]
    tops = tl.load(partial_max + part, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(partial_sum + part, mask=there, other=0.0, cache_modifier=".cg")
    cell = part * D + (c % D)[None, :]
    parts = tl.load(partial_acc + cell, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    weight = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(sums * weight, 0)
    acc = tl.sum(parts * weight, 0)
    result = acc * (1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(out + kv_head * (GROUP * D) + c, result.to(tl.bfloat16), mask=c < GROUP * D)


@triton.jit
def _none(R: tl.constexpr):
    """What no logit is behind yet."""
    return tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.int32)


@triton.jit
def _better(best, index, value, row):
    """The larger logit of each place, the first of equals; NaN is the largest."""
    ahead = (value > best) | (value != value)
    return tl.where(ahead, value, best), tl.where(ahead, row, index)


@triton.jit
def _most(best, index):
    """The largest of logits, NaN if one is, and the first index that has it."""
    nans = tl.max((best != best).to(tl.int32), 0)
    top = tl.max(tl.where(best != best, float("-inf"), best), 0)
    first = tl.min(tl.where(best == top, index, 2147483647), 0)
    return tl.where(nans > 0, float("nan"), top), first


@triton.jit
def _choose(bests, indices, tokens, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """The likeliest token of what each program found; -1 where logits are not finite."""
    at = tl.arange(0, BLOCK)
    there = at < PROGRAMS
    best = tl.load(bests + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    index = tl.load(indices + at, mask=there, other=0, cache_modifier=".cg")
    top, first = _most(best, index)
    finite = tl.abs(top) < float("inf")
    tl.store(tokens, tl.where(finite, first, -1).to(tl.int64))


@triton.jit
def _spoil(diagnosis, logits):
    """Makes a logit NaN where a launch was given up, lest numbers that are not right be used."""
    given_up = tl.load(diagnosis, volatile=True) != 0
    tl.store(logits, float("nan"), mask=given_up)
