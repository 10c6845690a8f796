"""The device side of the order of pairs: which come with which expert, and where.

A pair is a token and one of its slots: ``token * SLOTS + slot``. Each expert's come from the start
of a tile on, and tiles take turns: up to GROUP of one expert go through its columns together, so
that weights are in the L2 for all but the first.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _expert_of(
    ids, pair, IDS_OFFSET: tl.constexpr, IDS_ROW: tl.constexpr, IDS_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The expert of a pair; a number that is none is the nearest, so that nothing else is read."""
    token = (pair // SLOTS).to(tl.int64)
    expert = tl.load(ids + IDS_OFFSET + token * IDS_ROW + pair % SLOTS * IDS_COLUMN)
    return tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int32)


@triton.jit
def _most_tiles(pairs, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tiles at most, however the pairs choose: the last one of each expert may hold one alone."""
    return (pairs + tl.minimum(pairs, E) * (BLOCK_M - 1)) // BLOCK_M


@triton.jit
def _turn(expert, tile, tiles, GROUP: tl.constexpr):
    """What ``_turned`` reads of an expert's tile, one of so many: the groups are of one size, or
    the last one is smaller.

    GROUP is 16 at most.
    """
    groups = tl.maximum((tiles + GROUP - 1) // GROUP, 1)
    size = tl.maximum((tiles + groups - 1) // groups, 1)
    inside = tile % size
    height = tl.minimum(size, tiles - tile + inside)
    return expert * 256 + inside * 16 + height - 1


@triton.jit
def _turned(turn, index, BLOCKS: tl.constexpr):
    """Expert, tile of pairs and block of columns that come ``index``-th, where ``turn`` is that of
    tile ``index // BLOCKS``, which is of the same group.
    """
    first = index // BLOCKS - turn // 16 % 16
    height = turn % 16 + 1
    within = index - first * BLOCKS
    return turn // 256, first + within % height, within // height


@triton.jit
def _place(
    ids,
    order,
    turns,
    tokens,
    IDS_OFFSET: tl.constexpr,
    IDS_ROW: tl.constexpr,
    IDS_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e writes the pairs of expert e to ``order``, as they come, from the start of a tile
    on; the last tile's rest is filled with the number of pairs. Its tiles get their turns, and
    what is behind the last one's -1.

    Counts are sums of integers, so nothing depends on who comes first.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    me = tl.program_id(0)
    pairs = tokens * SLOTS
    step = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, CHUNK):
        at = tl.minimum(start + step, pairs - 1)
        expert = _expert_of(ids, at, IDS_OFFSET, IDS_ROW, IDS_COLUMN, SLOTS, E)
        # Bin E holds what is no pair.
        counts += tl.histogram(tl.where(start + step < pairs, expert, E), BINS)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(bins < me, tiles, 0), axis=0)
    count = tl.sum(tl.where(bins == me, counts, 0), axis=0)
    mine = tl.sum(tl.where(bins == me, tiles, 0), axis=0)
    slots = order + first * BLOCK_M
    before = first * 0
    for start in range(0, pairs, CHUNK):
        at = start + step
        expert = _expert_of(
            ids, tl.minimum(at, pairs - 1), IDS_OFFSET, IDS_ROW, IDS_COLUMN, SLOTS, E
        )
        is_mine = ((expert == me) & (at < pairs)).to(tl.int32)
        tl.store(slots + before + tl.cumsum(is_mine, axis=0) - 1, at, mask=is_mine != 0)
        before += tl.sum(is_mine, axis=0)
    rest = count + tl.arange(0, BLOCK_M)
    tl.store(slots + rest, tl.zeros_like(rest) + pairs, mask=rest < mine * BLOCK_M)
    for start in range(0, mine, 128):
        tile = start + tl.arange(0, 128)
        tl.store(turns + first + tile, _turn(me, tile, mine, GROUP), mask=tile < mine)
    if me == E - 1:
        most = _most_tiles(pairs, E, BLOCK_M)
        for start in range(first + mine, most, 128):
            tile = start + tl.arange(0, 128)
            tl.store(turns + tile, tl.full([128], -1, tl.int32), mask=tile < most)


@triton.jit
def _own(pairs, CHUNK: tl.constexpr):
    """The first of this program's pairs, and how many chunks of them it has."""
    chunks = tl.cdiv(tl.cdiv(pairs, CHUNK), tl.num_programs(0))
    return tl.program_id(0) * chunks * CHUNK, chunks


@triton.jit
def _count(
    ids,
    counts,
    tokens,
    IDS_OFFSET: tl.constexpr,
    IDS_ROW: tl.constexpr,
    IDS_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many of a program's pairs choose each expert, to its row of ``counts`` [programs, BINS].
    Bin E holds what is no pair.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pairs = tokens * SLOTS
    first, chunks = _own(pairs, CHUNK)
    found = tl.zeros([BINS], tl.int32)
    for chunk in range(0, chunks):
        pair = first + chunk * CHUNK + tl.arange(0, CHUNK)
        at = tl.minimum(pair, pairs - 1)
        expert = _expert_of(ids, at, IDS_OFFSET, IDS_ROW, IDS_COLUMN, SLOTS, E)
        found += tl.histogram(tl.where(pair < pairs, expert, E), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit
def _find(
    ids,
    counts,
    starts,
    places,
    order,
    turns,
    tokens,
    IDS_OFFSET: tl.constexpr,
    IDS_ROW: tl.constexpr,
    IDS_COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Where each pair goes, in the order of experts and of pairs, each expert's from the start of a
    tile on; the turns of tiles.

    Args:
        counts: as the same programs of ``_count`` leave them.
        starts: a row for each program, where its pairs of each expert go next.
        places: for each pair where it goes; behind as many turns as there can be, their number.
        order: instead of them, what went where, as of ``_place``; -1 behind the turns.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ROWS: tl.constexpr = 16  # of counts, read at once
    me, sharers = tl.program_id(0), tl.num_programs(0)
    pairs = tokens * SLOTS
    bins, step = tl.arange(0, BINS), tl.arange(0, CHUNK)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for start in range(0, sharers, ROWS):
        sharer = (start + tl.arange(0, ROWS))[:, None]
        some = tl.load(counts + sharer * BINS + bins[None, :], mask=sharer < sharers, other=0)
        total += tl.sum(some, axis=0)
        before += tl.sum(tl.where(sharer < me, some, 0), axis=0)
    total = tl.where(bins < E, total, 0)
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.cumsum(tiles, axis=0) - tiles
    for tile in range(me, tl.max(tiles, axis=0), sharers):
        tl.store(turns + first_tile + tile, _turn(bins, tile, tiles, GROUP), mask=tile < tiles)
    count, most = tl.sum(tiles, axis=0), _most_tiles(pairs, E, BLOCK_M)
    if order is None:
        if me == 0:
            tl.store(turns + most, count)
    else:
        for start in range(count + me * BINS, most, sharers * BINS):
            tl.store(turns + start + bins, tl.zeros_like(bins) - 1, mask=start + bins < most)
        behind = (first_tile + tiles) * BLOCK_M - 1
        for rest in range(me, BLOCK_M, sharers):
            there = rest < tiles * BLOCK_M - total
            tl.store(order + behind - rest, tl.zeros_like(bins) + pairs, mask=there)
    next_row = first_tile * BLOCK_M + before
    first, chunks = _own(pairs, CHUNK)
    for chunk in range(0, chunks):
        tl.store(starts + me * BINS + bins, next_row)
        tl.debug_barrier()  # they are looked up by other threads
        pair = first + chunk * CHUNK + step
        at = tl.minimum(pair, pairs - 1)
        expert = _expert_of(ids, at, IDS_OFFSET, IDS_ROW, IDS_COLUMN, SLOTS, E)
        same = (expert[:, None] == expert[None, :]) & (step[None, :] < step[:, None])
        place = tl.load(starts + me * BINS + expert) + tl.sum(same.to(tl.int32), axis=1)
        if order is None:
            tl.store(places + at, place, mask=pair < pairs)
        else:
            tl.store(order + place, at, mask=pair < pairs)
        next_row += tl.histogram(tl.where(pair < pairs, expert, E), BINS)
        tl.debug_barrier()  # until they were
