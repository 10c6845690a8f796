"""How weights come into a ring (ring_kernel.py): which tiles are a program's, and their copies."""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _mine(begin, count):
    """The program's tiles of the ``count`` from ``begin`` on, among all of its own."""
    programs = gl.num_programs(0)
    last = programs - 1 - gl.program_id(0)
    return (begin + last) // programs, (begin + count + last) // programs


@gluon.jit
def _bring_half(
    desc, boxes, bar, unit, to, K: gl.constexpr, P: gl.constexpr, UNIT: gl.constexpr,
    BOX: gl.constexpr, HALF: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Half a tile, whose weights begin at line ``unit``, into boxes from ``to`` on."""
    if K == P:
        mbarrier.expect(bar, HALF * UNIT * 2)
        for box in gl.static_range(HALF // BOX):
            tma.async_copy_global_to_shared(desc, [unit + box * BOX, 0], bar, boxes.index(to + box))
    elif HALF * UNIT >= P:  # whole rows
        mbarrier.expect(bar, HALF * UNIT // P * K * 2)
        for row in range(HALF * UNIT // P):
            for box in range(K // UNIT // BOX):
                place = boxes.index(to + row * (P // UNIT // BOX) + box)
                at = unit + row * (K // UNIT) + box * BOX
                tma.async_copy_global_to_shared(desc, [at, 0], bar, place)
    else:
        LINES: gl.constexpr = K // UNIT - HALF if SECOND else HALF
        mbarrier.expect(bar, LINES * UNIT * 2)
        for box in gl.static_range(LINES // BOX):
            tma.async_copy_global_to_shared(desc, [unit + box * BOX, 0], bar, boxes.index(to + box))


@gluon.jit
def _bring_product(
    desc, ring, ready, free, begin, place, N: gl.constexpr, K: gl.constexpr, P: gl.constexpr,
    GATED: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """The program's tiles of a product whose first line's number stands at ``place``, each half as
    soon as its slot is free and CAP halves before it are there. Rows of K, a pitch of P, both in
    units of 2 bytes. Returns where tiles end."""
    SLOTS: gl.constexpr = ring.shape[0]
    UNIT: gl.constexpr = ring.shape[2]
    R: gl.constexpr = ring.shape[1] * UNIT // P
    BOX: gl.constexpr = desc.block_type.shape[0]
    HALF: gl.constexpr = ring.shape[1] // 2
    ROW: gl.constexpr = K // UNIT
    boxes = ring._reinterpret(ring.dtype, [SLOTS * 2 * HALF // BOX, BOX, UNIT], desc.layout)
    first, end = _mine(begin, N // R)
    start = gl.load(place).to(gl.int32)
    for item in range(first, end):
        slot = item % SLOTS
        tile = gl.program_id(0) + item * gl.num_programs(0) - begin
        mbarrier.wait(free.index(slot), ((item // SLOTS) & 1) ^ 1)
        for half in gl.static_range(2):
            number = item * 2 + half
            if number >= CAP:
                early = number - CAP
                mbarrier.wait(ready.index(early % (2 * SLOTS)), (early // (2 * SLOTS)) & 1)
            if GATED:
                unit = start + (half * (N // 2) + tile * (R // 2)) * ROW
            elif R > 1:
                unit = start + (tile * R + half * (R // 2)) * ROW
            else:
                unit = start + tile * ROW + half * HALF
            bar = ready.index(slot * 2 + half)
            to = (slot * 2 + half) * (HALF // BOX)
            _bring_half(desc, boxes, bar, unit, to, K, P, UNIT, BOX, HALF, half == 1)
    return begin + N // R


@gluon.jit
def _bring(
    desc, desc_attended, desc_inner, desc_head, ring, ready, free, places, LAYERS: gl.constexpr,
    WIDTH: gl.constexpr, ATTENDED: gl.constexpr, QKV: gl.constexpr, INNER: gl.constexpr,
    VOCAB: gl.constexpr, P: gl.constexpr, P_ATTENDED: gl.constexpr, P_INNER: gl.constexpr,
    CAP: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """All weights of a step."""
    wide: gl.constexpr = WIDTH * BITS // 16
    wide_pitch: gl.constexpr = P * BITS // 16
    begin = 0
    for layer in range(LAYERS):
        place = places + layer * 12
        begin = _bring_product(
            desc, ring, ready, free, begin, place, QKV, wide, wide_pitch, False, CAP
        )
        begin = _bring_product(
            desc_attended, ring, ready, free, begin, place + 1, WIDTH, ATTENDED * BITS // 16,
            P_ATTENDED * BITS // 16, False, CAP,
        )  # fmt: skip
        begin = _bring_product(
            desc, ring, ready, free, begin, place + 2, 2 * INNER, wide, wide_pitch, True, CAP
        )
        begin = _bring_product(
            desc_inner, ring, ready, free, begin, place + 3, WIDTH, INNER * BITS // 16,
            P_INNER * BITS // 16, False, CAP,
        )  # fmt: skip
    _bring_product(
        desc_head, ring, ready, free, begin, places + LAYERS * 12, VOCAB, WIDTH, P, False, CAP
    )
