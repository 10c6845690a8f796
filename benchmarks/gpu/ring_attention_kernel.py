"""What the trial of a ring waits with, and its attention (ring_kernel.py)."""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# One thread polls; once one of the launch has given up, which it says in diagnosis[0], so do all.
_POLL = gl.constexpr("""{
    .reg .pred idle, there, late, told;
    .reg .b32 lane, seen, gap, polls, low, flag;
    mov.u32 lane, %tid.x;
    and.b32 lane, lane, $4;
    setp.ne.u32 idle, lane, 0;
    mov.u32 polls, 0;
    @idle bra DONE;
POLL:
    ld.acquire.gpu.global.b32 seen, [$1];
    sub.s32 gap, seen, $2;
    setp.ge.s32 there, gap, 0;
    @there bra DONE;
    add.u32 polls, polls, 1;
    and.b32 low, polls, 255;
    setp.ne.u32 told, low, 0;
    @told bra POLL;
    ld.relaxed.gpu.global.b32 flag, [$3];
    setp.ne.u32 late, flag, 0;
    @late bra DONE;
    setp.lt.u32 late, polls, $5;
    @late bra POLL;
    st.relaxed.gpu.global.b32 [$3+4], $6;
    st.relaxed.gpu.global.b32 [$3+8], seen;
    st.relaxed.gpu.global.b32 [$3+12], $2;
    mov.u32 flag, 1;
    st.relaxed.gpu.global.b32 [$3], flag;
DONE:
    bar.warp.sync 0xffffffff;
    mov.u32 $0, polls;
}""")

_SPIN = gl.constexpr("""{
    .reg .pred more;
    .reg .b32 start, now;
    mov.u32 start, %clock;
SPIN:
    mov.u32 now, %clock;
    sub.u32 now, now, start;
    setp.lt.u32 more, now, $1;
    @more bra SPIN;
    mov.u32 $0, now;
}""")


@gluon.jit
def _rounded(x):
    """A float32 as bfloat16 has it."""
    return x.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _wait(counter, target, diagnosis, call, limit, ATOMIC: gl.constexpr):
    """Waits until a counter has reached its target, modulo 2^32, or the launch is given up. Behind
    it all threads of the partition see what was written before the counter was added to.
    """
    if ATOMIC:
        seen = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        polls = 0
        while (seen - target < 0) & (polls < limit):
            seen = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            polls += 1
            if polls % 256 == 0:
                polls = gl.where(gl.load(diagnosis, volatile=True) != 0, limit, polls)
        if seen - target < 0:
            gl.store(diagnosis + 1, call)
            gl.store(diagnosis + 2, seen)
            gl.store(diagnosis + 3, target)
            gl.atomic_xchg(diagnosis, 1, sem="relaxed", scope="gpu")
    else:
        gl.inline_asm_elementwise(
            _POLL, "=r,l,r,l,r,r,r",
            [counter, target, diagnosis, gl.num_warps() * 32 - 1, limit, call],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()  # gl.barrier since 3.7, gl.thread_barrier before; of this partition


@gluon.jit
def _arrive(counter):
    """Tells those who wait that all that this partition wrote is there."""
    tl.debug_barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def _stand_in(
    q, out, before, target, diagnosis, call, limit, cycles, WIDTH: gl.constexpr,
    WAITS: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Stands in for attention: a part of q is copied, after a time like attention's."""
    PIECES: gl.constexpr = 64
    PART: gl.constexpr = WIDTH // PIECES
    part: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if gl.program_id(0) < PIECES:
        at = gl.program_id(0) * PART + gl.arange(0, PART, layout=part)
        if WAITS:
            _wait(before, target, diagnosis, call, limit, ATOMIC)
        values = gl.load(q + at)
        gl.inline_asm_elementwise(_SPIN, "=r,r", [cycles], dtype=gl.int32, is_pure=False, pack=1)
        gl.store(out + at, values)
        _arrive(before + 32)


@gluon.jit
def _turned(x, head, d, cos, sin):
    """Rope of heads of x [*, 64] in halves, f32 [len(head), 64], rounded to bfloat16."""
    own = gl.load(x + head[:, None] * 64 + d[None, :]).to(gl.float32)
    other = gl.load(x + head[:, None] * 64 + ((d + 32) % 64)[None, :]).to(gl.float32)
    sign = gl.where(d < 32, -1.0, 1.0)
    return _rounded(own * cos[None, :] + other * (sign * sin)[None, :])


@gluon.jit
def _attend(
    qkv,
    out,
    cache,
    angles,
    partial,
    heads_met,
    before,
    target,
    diagnosis,
    call,
    limit,
    KEYS: gl.constexpr,
    WAITS: gl.constexpr,
    ATOMIC: gl.constexpr,
):
    """Attention of 32 query heads and 8 KV heads of 64 to 8 * KEYS tokens, of which the newest is
    in qkv: a piece has the keys of one split and KV head. Keys and values of earlier tokens are on
    their way before the wait; who comes last of a KV head merges.
    """
    # cache: bf16 [2, 8 * KEYS, 8, 64], keys after rope; angles: f32 [2, 32]; partial: f32
    # [8, 32, 66]; heads_met: i32, one every 32
    WARPS: gl.constexpr = gl.num_warps()
    CONTEXT: gl.constexpr = 8 * KEYS
    FACTOR: gl.constexpr = 0.125 * 1.4426950408889634
    deep: gl.constexpr = gl.BlockedLayout([4, 1, 8], [1, 4, 8], [1, WARPS, 1], [2, 1, 0])
    keyed: gl.constexpr = gl.SliceLayout(0, deep)
    headed: gl.constexpr = gl.SliceLayout(1, deep)
    if gl.program_id(0) < 64:
        kv = gl.program_id(0) % 8
        split = gl.program_id(0) // 8
        n = split * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, keyed))
        d = gl.arange(0, 64, layout=gl.SliceLayout(0, keyed))
        e = gl.arange(0, 64, layout=gl.SliceLayout(0, headed))
        head = kv * 4 + gl.arange(0, 4, layout=gl.SliceLayout(1, headed))
        cell = n[:, None] * 512 + kv * 64 + d[None, :]
        k = gl.load(cache + cell)
        v = gl.load(cache + CONTEXT * 512 + cell)
        cos, sin = gl.load(angles + e % 32), gl.load(angles + 32 + e % 32)
        cos_k, sin_k = gl.load(angles + d % 32), gl.load(angles + 32 + d % 32)
        one = gl.arange(0, 1, layout=gl.SliceLayout(1, keyed))
        if WAITS:
            _wait(before, target, diagnosis, call, limit, ATOMIC)
        q = _turned(qkv, head, e, cos, sin)
        new_k = _turned(qkv + 2048, kv + one, d, cos_k, sin_k).to(gl.bfloat16)
        new_v = gl.load(qkv + 2560 + kv * 64 + d)[None, :]
        newest = (n == CONTEXT - 1)[:, None]
        k = gl.where(newest, new_k, k)
        v = gl.where(newest, new_v, v)
        gl.store(cache + cell, k, mask=newest)
        gl.store(cache + CONTEXT * 512 + cell, v, mask=newest)
        products = gl.expand_dims(k.to(gl.float32), 0) * gl.expand_dims(q, 1)
        scores = gl.sum(products, 2) * FACTOR
        top = gl.max(scores, 1)
        weights = gl.exp2(scores - gl.expand_dims(top, 1))
        total = gl.sum(weights, 1)
        weighed = gl.expand_dims(_rounded(weights), 2) * gl.expand_dims(v.to(gl.float32), 0)
        sums = gl.sum(weighed, 1)
        part = partial + split * (32 * 66)
        top_group = kv * 4 + gl.arange(0, 4, layout=top.type.layout)
        gl.store(part + top_group * 66, top)
        gl.store(part + top_group * 66 + 1, total)
        sum_d = gl.arange(0, 64, layout=gl.SliceLayout(0, sums.type.layout))
        sum_head = kv * 4 + gl.arange(0, 4, layout=gl.SliceLayout(1, sums.type.layout))
        gl.store(part + (sum_head * 66 + 2)[:, None] + sum_d[None, :], sums)
        tl.debug_barrier()
        met = gl.atomic_add(heads_met + 32 * kv, 1, sem="acq_rel", scope="gpu")
        if (met + 1) % 8 == 0:
            flat: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, WARPS], [1, 0])
            c = gl.arange(0, 256, layout=gl.SliceLayout(0, flat))
            s = gl.arange(0, 8, layout=gl.SliceLayout(1, flat))
            at = partial + s[:, None] * (32 * 66) + ((kv * 4 + c // 64) * 66)[None, :]
            tops = gl.load(at, cache_modifier=".cg")
            totals = gl.load(at + 1, cache_modifier=".cg")
            parts = gl.load(at + 2 + (c % 64)[None, :], cache_modifier=".cg")
            decay = gl.exp2(tops - gl.max(tops, 0)[None, :])
            result = gl.sum(parts * decay, 0) / gl.sum(totals * decay, 0)
            gl.store(out + kv * 256 + c, result.to(gl.bfloat16))
            _arrive(before + 32)
