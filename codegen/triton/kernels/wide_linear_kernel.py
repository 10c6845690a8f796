"""The device side of products of many tokens: what wide_linear.py puts into a kernel's text.

Tiles of both operands come by descriptors, which fill what lies beyond an end with zeros, so that
nothing is masked before the store. ``weight`` is one over [N, K], or over [PARTS, N, K].
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _place(tile, tokens, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP):
    """First token and first column of a tile. Tiles go down GROUP blocks of tokens before they go
    on to the next columns: those at work at one time share rows of x and of weights in the L2.
    """
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tile // (GROUP * COLUMNS) * GROUP
    height = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first, GROUP)
    inside = tile % (GROUP * COLUMNS)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _product(
    x,
    weight,
    token,
    column,
    begin,
    end,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tokens of x times rows of each part of the weight, over the steps from ``begin`` to ``end``:
    f32 [BLOCK_M, PARTS * BLOCK_N], one operand and one sum of the tensor cores for all parts.
    """
    acc = tl.zeros([BLOCK_M, PARTS * BLOCK_N], tl.float32)
    for step in range(begin, end):
        rows = x.load([token, step * BLOCK_K])
        if PARTS == 1:
            columns = weight.load([column, step * BLOCK_K])
        else:
            both = weight.load([0, column, step * BLOCK_K])
            columns = tl.reshape(both, (PARTS * BLOCK_N, BLOCK_K))
        acc = tl.dot(rows, tl.trans(columns), acc)
    return acc


@triton.jit
def _share(tiles, STEPS: tl.constexpr, PROGRAMS: tl.constexpr):
    """What this program has of the tiles: the tiles that it computes whole, one a round; and of
    the steps of all others, which are dealt out evenly, the first one, and the one behind its last
    (both 0 for none). Then how many tiles are computed whole, by all, and among how many programs
    the steps of the others are shared.

    Rounds are full but for the last two, which are dealt out: so each has more than half a tile of
    work where there are as many tiles as programs, and no more than two parts of one.
    """
    rounds = tiles // PROGRAMS
    if tiles % PROGRAMS != 0:
        rounds = tl.maximum(rounds - 1, 0)
    steps = (tiles - rounds * PROGRAMS) * STEPS
    sharers = tl.maximum(tl.minimum(steps, PROGRAMS), 1)
    # From behind: who adds parts up comes later than those who leave them. Programs start in their
    # order, so what one waits for is there or at work.
    turn = sharers - 1 - tl.program_id(0)
    start = tl.maximum(turn, 0) * steps // sharers
    stop = tl.maximum(turn + 1, 0) * steps // sharers
    return rounds, start, stop, steps, sharers


@triton.jit
def _piece(index, rounds, start, stop, STEPS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The tile of a program's piece of work, and its steps of it."""
    own = start // STEPS + index - rounds
    tile = rounds * PROGRAMS + own
    begin = tl.maximum(start - own * STEPS, 0)
    end = tl.minimum(stop - own * STEPS, STEPS)
    if index < rounds:
        tile = index * PROGRAMS + tl.program_id(0)
        begin = 0
        end = STEPS
    return tile, begin, end


@triton.jit
def _halves(acc):
    """The two halves of a tile's columns, which are of the same threads."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _cells(part, M: tl.constexpr, N: tl.constexpr):
    """Where the first half of a part's columns lies in memory, the second behind it."""
    return part * (2 * M * N) + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def _leave(acc, partial, counters, tile, turn):
    """Leaves a part of a tile's sums for the program that has its first steps."""
    M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    first, second = _halves(acc)
    cells = partial + _cells(turn, M, HALF)
    tl.store(cells, first)
    tl.store(cells + M * HALF, second)
    tl.debug_barrier()  # all of the part is written before it is counted
    tl.atomic_add(counters + tile, 1, sem="release", scope="gpu")


@triton.jit
def _gather(acc, partial, counters, tile, end, turn, steps, sharers):
    """The sums of a tile whose first steps are this program's: its own, then the parts of those
    that have the steps behind, in their order. The same bits every time.

    Args:
        end: one behind the tile's last step, of ``steps`` that ``sharers`` have.
    """
    M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    first, second = _halves(acc)
    stop = tl.cdiv(end * sharers, steps)  # the first whose steps begin at ``end`` or later
    while tl.atomic_add(counters + tile, 0, sem="acquire", scope="gpu") < stop - turn - 1:
        pass
    tl.debug_barrier()
    for other in range(turn + 1, stop):
        cells = partial + _cells(other, M, HALF)  # halves, for registers hold no whole part more
        first += tl.load(cells, cache_modifier=".cg")
        second += tl.load(cells + M * HALF, cache_modifier=".cg")
    tl.store(counters + tile, 0)
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (M, 2 * HALF))
