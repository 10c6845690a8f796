"""Buffer plan: where each temporary of a Program lies in one arena, from its buffers' lifetimes.

Offsets come from greedy best fit, largest buffers first (Pisarchyk and Lee, 2001.03288), tried in a
few other orders too; the smallest arena wins. No arena can be smaller than the bytes live at the
fullest call, which the plan reports beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..ir.dims import evaluate
from .plan_storage import storage_of
from .program import Call, Json, Program

ALIGNMENT = 256
Role: TypeAlias = Literal["temporary", "input", "state", "weight", "output"]


@dataclass(frozen=True, slots=True)
class Placement:
    """One storage: a rectangle of calls × bytes.

    Attributes:
        buffer: the buffer that the storage is made for.
        role: "temporary" ones lie in the arena, the others belong to the caller or the engine.
        size: bytes, without padding.
        first, last: indices of the first call that writes it and the last one that reads it, both
            included; of what is there before the calls, and stays after them, all calls.
        offset: bytes from the start of the arena, a multiple of 256; None outside of it.
        shared_by: other buffers in the same memory: views, and results written in place.
    """

    buffer: str
    role: Role
    size: int
    first: int
    last: int
    offset: int | None = None
    shared_by: tuple[str, ...] = ()

    @property
    def padded(self) -> int:
        """Bytes that it takes in the arena."""
        return -(-self.size // ALIGNMENT) * ALIGNMENT

    def meets(self, other: Placement) -> bool:
        """Whether some call needs both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of a Program for given sizes.

    Attributes:
        program: name of the Program.
        sizes: values of its symbols.
        num_calls: how many calls it has.
        placements: every storage, in the order of first use.
        peak: size of the arena in bytes.
        lower_bound: bytes of temporaries live at the fullest call: no arena is smaller.
        free_calls: indices of calls that compute nothing, since their results are views.
    """

    program: str
    sizes: Mapping[str, int]
    num_calls: int
    placements: tuple[Placement, ...]
    peak: int
    lower_bound: int
    free_calls: tuple[int, ...]

    @property
    def temporaries(self) -> tuple[Placement, ...]:
        """What lies in the arena."""
        return tuple(p for p in self.placements if p.role == "temporary")

    def bytes_of(self, role: Role) -> int:
        """Bytes of all storages of one role, without padding; of temporaries as if none shared."""
        return sum(p.size for p in self.placements if p.role == role)

    def live_bytes(self) -> list[int]:
        """Padded bytes of temporaries that are live during each call."""
        return _live_bytes(self.temporaries, self.num_calls)

    def to_json(self) -> Json:
        """The plan as plain data."""
        return {
            "program": self.program,
            "sizes": dict(self.sizes),
            "num_calls": self.num_calls,
            "peak": self.peak,
            "lower_bound": self.lower_bound,
            "free_calls": list(self.free_calls),
            "placements": [_placement_to_json(p) for p in self.placements],
        }


def plan_buffers(program: Program, sizes: Mapping[str, int]) -> MemoryPlan:
    """Gives every temporary of ``program`` a place such that no two that are live at once overlap.

    Args:
        program: calls in the order in which they run, on one stream.
        sizes: a value for each symbol of the buffers' shapes. A plan holds for these and for all
            sizes that make no buffer larger: calls count whatever their guards say. ``Program.at``
            has fewer, for a plan of these sizes alone.

    Raises:
        GraphError: a symbol without a value.
    """
    storage, free_calls = storage_of(program, sizes)
    shared: dict[str, list[str]] = {}
    for name, root in storage.items():
        shared.setdefault(root, [])
        if name != root:
            shared[root].append(name)
    spans = _lifetimes(program.calls, storage)
    roles = _roles(program, storage)
    end = max(len(program.calls) - 1, 0)
    found = []
    for root in shared:
        role = roles.get(root, "temporary")
        first, last = spans.get(root, (0, end))
        if role == "output":
            last = end
        elif role != "temporary":
            first, last = 0, end
        size = evaluate(program.buffers[root].nbytes, sizes)
        found.append(Placement(root, role, size, first, last, None, tuple(shared[root])))
    found.sort(key=lambda p: (p.first, p.buffer))
    temporaries = [p for p in found if p.role == "temporary"]
    bound = max(_live_bytes(temporaries, len(program.calls)), default=0)
    placed, peak = _smallest(temporaries, bound)
    return MemoryPlan(
        program.name,
        dict(sizes),
        len(program.calls),
        tuple(placed.get(p.buffer, p) for p in found),
        peak,
        bound,
        free_calls,
    )


def _lifetimes(calls: Sequence[Call], storage: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """First and last call that touches each storage."""
    spans: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(calls):
        for name in (*call.operands, *call.results):
            if name is not None:
                first, _ = spans.get(storage[name], (index, index))
                spans[storage[name]] = (first, index)
    return spans


def _roles(program: Program, storage: Mapping[str, str]) -> dict[str, Role]:
    roles: dict[str, Role] = {storage[buffer]: "output" for _, buffer in program.outputs}
    names = {name for name, _ in program.outputs}
    for name in program.inputs:
        roles[storage[name]] = "state" if name in names else "input"
    for name in program.weights:
        roles[storage[name]] = "weight"
    return roles


_ORDERS: tuple[Callable[[Placement], tuple[int, ...]], ...] = (
    lambda p: (-p.padded, p.first),
    lambda p: (p.first - p.last, -p.padded),
    lambda p: (p.first, -p.padded),
)


def _smallest(temporaries: Sequence[Placement], bound: int) -> tuple[dict[str, Placement], int]:
    """The best of the greedy placements, by name, and the size of its arena."""
    best: dict[str, Placement] = {}
    peak: int | None = None
    for order in _ORDERS:
        placed = _best_fit(sorted(temporaries, key=order))
        size = max(((p.offset or 0) + p.padded for p in placed), default=0)
        if peak is None or size < peak:
            best, peak = {p.buffer: p for p in placed}, size
        if peak == bound:
            break
    return best, peak or 0


def _best_fit(ordered: Iterable[Placement]) -> list[Placement]:
    """Each in the tightest gap between those placed before it that live at the same time."""
    placed: list[tuple[int, Placement]] = []
    for each in ordered:
        free, best, slack = 0, None, None
        for offset, other in sorted((pair for pair in placed if pair[1].meets(each)), key=_start):
            gap = offset - free - each.padded
            if gap >= 0 and (slack is None or gap < slack):
                best, slack = free, gap
            free = max(free, offset + other.padded)
        place = free if best is None else best
        placed.append((place, replace(each, offset=place)))
    return [each for _, each in placed]


def _start(pair: tuple[int, Placement]) -> int:
    return pair[0]


def _live_bytes(placements: Iterable[Placement], num_calls: int) -> list[int]:
    live = [0] * num_calls
    for each in placements:
        for index in range(each.first, each.last + 1):
            live[index] += each.padded
    return live


def _placement_to_json(placement: Placement) -> Json:
    return {
        "buffer": placement.buffer,
        "role": placement.role,
        "size": placement.size,
        "first": placement.first,
        "last": placement.last,
        "offset": placement.offset,
        "shared_by": list(placement.shared_by),
    }
