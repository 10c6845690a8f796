"""The memory that a step holds as it is run today: results are allocated call by call, and go when
their last user has.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...codegen.plan import MemoryPlan
from ...codegen.program import Program

_ROLES = ("temporary", "output")  # what a step allocates; the others are there before


def resident_peak(program: Program, plan: MemoryPlan, workspaces: Sequence[int]) -> int:
    """The most bytes of results and workspaces that are alive at once under `ProgramRunner`.

    A storage lives until `Call.frees` has named every buffer in it, whatever the lifetimes say;
    what a call without operands gives that has no symbolic size is made once, and stays.

    Args:
        program: whose calls run in order.
        plan: its buffers at the phase's sizes, for what shares memory, and how large it is.
        workspaces: bytes of each call's own, which go as it returns.
    """
    own = [placement for placement in plan.placements if placement.role in _ROLES]
    root = {name: p.buffer for p in own for name in (p.buffer, *p.shared_by)}
    size = {placement.buffer: placement.size for placement in own}
    kept = {name for call in program.calls if not call.operands for name in call.results}
    kept = {name for name in kept if not program.buffers[name].symbols}
    alive = {root[name]: {name} for name in kept if name in root}
    live = sum(size[storage] for storage in alive)
    peak = live
    for call, workspace in zip(program.calls, workspaces, strict=True):
        for name in call.results:
            if name not in root or name in kept:
                continue
            if root[name] not in alive:
                alive[root[name]] = set()
                live += size[root[name]]
            alive[root[name]].add(name)
        peak = max(peak, live + workspace)
        for name in set(call.frees) - kept:
            names = alive.get(root.get(name, ""), set())
            names.discard(name)
            if name in root and not names and alive.pop(root[name], None) is not None:
                live -= size[root[name]]
    return peak
