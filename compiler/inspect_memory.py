"""The memory plan of an engine at given sizes: which intermediate value lies where, and when."""

from __future__ import annotations

from dataclasses import dataclass

from ..codegen.base import get_backend
from ..codegen.program import Program
from ..ir.dims import evaluate
from ..runtime.image import EngineImage
from ..targets import Target
from .inspect_facts import FREE, Setting, bindings, final_graph

ALIGNMENT = 64  # a cache line: what allocators give


@dataclass(frozen=True, slots=True)
class Placed:
    """One intermediate value in the arena.

    Attributes:
        name: of the buffer.
        type: its element type and shape.
        start, stop: indices of the calls that make it, and that use it last.
        offset, bytes: where it lies.
    """

    name: str
    type: str
    start: int
    stop: int
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Arena:
    """The placed values of a Program.

    Attributes:
        calls: the kernel of each call.
        placed: every value, in the order in which they are made.
        bytes: end of the highest value.
        live_bytes: most bytes alive at one call: no plan can be smaller.
        of_graph: the Program has too few calls to show anything (one session runs the whole
            graph): this is the plan of the graph, run op by op.
    """

    calls: tuple[str, ...]
    placed: tuple[Placed, ...]
    bytes: int
    live_bytes: int
    of_graph: bool


def memory_plan(image: EngineImage, setting: Setting) -> Arena:
    """The plan at one setting: values live from their call to their last use."""
    graph = final_graph(image)
    program, of_graph = image.program, False
    if len(program.calls) < len(graph.nodes) // 4:
        lowered = get_backend("eager").lower(graph, Target.parse(image.target))
        program, of_graph = lowered.program, True
    return _arena(program, bindings(graph, image, setting), of_graph)


def memory_facts(image: EngineImage, setting: Setting) -> dict[str, int]:
    """The plan's sums, in bytes."""
    arena = memory_plan(image, setting)
    return {
        "buffers": len(arena.placed),
        "sum_bytes": sum(value.bytes for value in arena.placed),
        "arena_bytes": arena.bytes,
        "live_bytes": arena.live_bytes,
    }


def _arena(program: Program, sizes: dict[str, int], of_graph: bool) -> Arena:
    owners = _owners(program)
    spans: dict[str, list[int]] = {}
    for index, call in enumerate(program.calls):
        for name in (*call.results, *call.operands):
            if name is None:
                continue
            owner = owners.get(name, name)
            spans.setdefault(owner, [index, index])[1] = index
    outside = {*program.inputs, *program.weights}
    kept = {owners.get(buffer, buffer) for _, buffer in program.outputs}
    placed: list[Placed] = []
    for name, (start, stop) in spans.items():
        if name in outside:
            continue
        end = len(program.calls) if name in kept else stop
        count = evaluate(program.buffers[name].nbytes, sizes)
        count = -(-count // ALIGNMENT) * ALIGNMENT
        offset = _lowest(placed, start, end, count)
        placed.append(Placed(name, str(program.buffers[name]), start, end, offset, count))
    top = max((value.offset + value.bytes for value in placed), default=0)
    live = max(
        (sum(v.bytes for v in placed if v.start <= i <= v.stop) for i in range(len(program.calls))),
        default=0,
    )
    return Arena(tuple(c.kernel for c in program.calls), tuple(placed), top, live, of_graph)


def _owners(program: Program) -> dict[str, str]:
    """The buffer whose memory a result lies in: its operand's if written in place or a view."""
    owners: dict[str, str] = {}
    for call in program.calls:
        aliases = dict(call.aliases)
        is_view = call.kernel.split("/", 1)[1] in FREE
        for index, name in enumerate(call.results):
            source = aliases.get(index, 0 if is_view else None)
            operand = None if source is None else call.operands[source]
            owners[name] = name if operand is None else owners.get(operand, operand)
    return owners


def _lowest(placed: list[Placed], start: int, stop: int, count: int) -> int:
    """The lowest offset that is free from call ``start`` to ``stop``."""
    busy = sorted(
        (v.offset, v.offset + v.bytes) for v in placed if v.start <= stop and start <= v.stop
    )
    offset = 0
    for low, high in busy:
        if offset + count <= low:
            break
        offset = max(offset, high)
    return offset
