"""The schedule of the trial of a ring, and its simulation: no deadlock, each tile once, nothing
read before it is written or written before all have read it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

LAYERS, WIDTH, QKV, INNER, VOCAB = 16, 2048, 3072, 8192, 128256
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
PIECES = 64  # of attention or its stand-in (ring_attention_kernel.py)


@dataclass(frozen=True)
class Way:
    """A way to run the step.

    Attributes:
        rows: of a tile in the arena, 512 bytes each: 64 are 32 KB.
        slots: of the ring.
        groups: of warps that multiply: one of 8 or two of 4.
        attention: cycles that its stand-in takes; none if there is no stand-in.
        context: tokens, the newest included, that attention itself is for; 0 if it is left out.
        waits: whether products wait for those before; without, results are wrong.
        shared_x: whether warps of a group get x from each other, not each from L1.
        atomic: whether polls are atomic adds of zero, the result broadcast to the group.
    """

    rows: int = 64
    slots: int = 6
    groups: int = 1
    attention: int | None = None
    context: int = 0
    waits: bool = True
    shared_x: bool = False
    atomic: bool = False


@dataclass(frozen=True)
class Call:
    """A step of the schedule.

    Attributes:
        tiles: of weights; 0 for attention or its stand-in.
        reads: buffers that it needs whole, and the one that its own rows are read from.
        writes: the buffer that it writes.
        added: whether a tile's rows of ``writes`` are read before the wait.
        merged: whether only who comes last of a KV head's pieces arrives.
    """

    tiles: int
    reads: str
    writes: str
    added: bool = False
    merged: bool = False

    def arrivals(self, full: int) -> int:
        """What its counter gets to, with ``full`` groups of warps in all."""
        return min(self.tiles, full) if self.tiles else KV_HEADS if self.merged else PIECES


def schedule(way: Way, layers: int = LAYERS) -> list[Call]:
    """The calls of a step, in order."""
    rows, down_rows = way.rows * 256 // WIDTH, way.rows * 256 // INNER
    calls: list[Call] = []
    for _ in range(layers):
        calls.append(Call(QKV // rows, "h", "qkv"))
        if way.attention is not None or way.context:
            calls.append(Call(0, "qkv", "attended", merged=way.context > 0))
        calls.append(Call(WIDTH // rows, calls[-1].writes, "h", added=True))
        calls.append(Call(2 * INNER // rows, "h", "gated"))
        calls.append(Call(WIDTH // down_rows, "gated", "h", added=True))
    calls.append(Call(VOCAB // rows, "h", "logits"))
    return calls


def simulate(way: Way, programs: int, seed: int = 0, layers: int = LAYERS) -> None:
    """Runs the schedule as the kernel does, programs and groups in random order.

    Raises:
        RuntimeError: if it gets stuck, a tile is not computed once, or something is read before it
            is written or written before all have read it.
    """
    calls, order = schedule(way, layers), random.Random(seed)
    full = programs * way.groups
    targets = [call.arrivals(full) for call in calls]
    count = sum(call.tiles for call in calls)
    arrived, done, seen = [0] * len(calls), [0] * len(calls), [0] * count
    brought, pieces = [0] * programs, [0] * (len(calls) * KV_HEADS)
    used = [[False] * (-(-(count - p) // programs)) for p in range(programs)]

    def check(holds: bool, what: str, call: int) -> None:
        if not holds:
            raise RuntimeError(f"{what} (call {call} of {way}, {programs} programs)")

    def run(mine: int, which: int) -> Iterator[None]:
        begin = waited = 0
        for index, call in enumerate(calls):
            first = -(-(begin - mine) // programs)
            end = -(-(begin + call.tiles - mine) // programs)
            first += (first + which) % way.groups
            takes = first < end if call.tiles else which == 0 and mine < PIECES
            if call.added and takes:
                # What a residual's rows come from was waited for two products ago at most.
                since = max((i for i in range(index) if calls[i].writes == "h"), default=-1)
                check(waited >= since + 1, "a residual is read early", index)
            if takes and index:
                while arrived[index - 1] != targets[index - 1]:
                    yield
                waited = index
            later = [i for i in range(index) if calls[i].reads == call.writes]
            check(
                not takes or not later or arrived[later[-1]] == targets[later[-1]],
                "a buffer is written while it is read", index,
            )  # fmt: skip
            for item in range(first, end, way.groups):
                while item >= brought[mine]:
                    yield
                used[mine][item] = True
                seen[mine + item * programs] += 1
                done[index] += 1
            if takes and call.merged:
                met = index * KV_HEADS + mine % KV_HEADS
                pieces[met] += 1
                arrived[index] += pieces[met] == PIECES // KV_HEADS
            elif takes:
                arrived[index] += 1
            begin += call.tiles

    runs = [run(mine, which) for mine in range(programs) for which in range(way.groups)]
    while runs:
        before = sum(map(sum, used)) + sum(brought) + sum(arrived)
        for mine in range(programs):
            while brought[mine] < len(used[mine]) and (
                brought[mine] < way.slots or used[mine][brought[mine] - way.slots]
            ):
                brought[mine] += 1
        order.shuffle(runs)
        runs = [one for one in runs if next(one, "end") is None]
        after = sum(map(sum, used)) + sum(brought) + sum(arrived)
        check(bool(not runs or after > before), "it is stuck", len(calls))
    check(set(seen) == {1}, "a tile is not computed once", 0)
    check(arrived == targets, "a counter does not reach its target", 0)
