"""The memory plan of an engine at given sizes: which intermediate value lies where, and when."""

from __future__ import annotations

from dataclasses import dataclass

from ...codegen.base import get_backend
from ...codegen.plan import MemoryPlan, plan_buffers
from ...codegen.program import Program
from ...runtime.image import EngineImage
from ...targets import Target
from .facts import Setting, as_run, bindings, final_graph


@dataclass(frozen=True, slots=True)
class Arena:
    """A plan, and the Program that it is for.

    Attributes:
        program: its calls are the plan's horizontal axis.
        plan: where everything lies.
        of_graph: the engine's own Program has too few calls to show anything (one session runs the
            whole graph): this is the plan of the graph, run op by op.
    """

    program: Program
    plan: MemoryPlan
    of_graph: bool


def memory_plan(image: EngineImage, setting: Setting) -> Arena:
    """The buffer plan of the Program that runs a setting."""
    image = as_run(image, setting)
    graph = final_graph(image)
    sizes = bindings(graph, image, setting)
    program, of_graph = image.program.at(sizes), False
    if len(program.calls) < len(graph.nodes) // 4:
        lowered = get_backend("eager").lower(graph, Target.parse(image.target))
        program, of_graph = lowered.program, True
    return Arena(program, plan_buffers(program, sizes), of_graph)


def memory_facts(image: EngineImage, setting: Setting) -> dict[str, int]:
    """The plan's sums, in bytes."""
    plan = memory_plan(image, setting).plan
    return {
        "buffers": len(plan.temporaries),
        "sum_bytes": plan.bytes_of("temporary"),
        "arena_bytes": plan.peak,
        "live_bytes": plan.lower_bound,
    }
