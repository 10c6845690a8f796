"""Which Program runs an engine's decode steps: the one place that knows."""

from __future__ import annotations

from ...codegen.program import Program
from ...runtime.engine import CausalLMEngine
from ...runtime.image import EngineImage
from ...runtime.runner import ProgramRunner


def decode_runner(engine: CausalLMEngine) -> ProgramRunner:
    """What runs steps in which every sequence brings one token."""
    graphs = getattr(engine.executor, "graphs", None)
    runner: ProgramRunner = engine.runner if graphs is None else graphs.runner
    return runner


def decode_image(engine: CausalLMEngine) -> EngineImage:
    """The engine with the Program and the graphs of its decode steps."""
    image = engine.image.decoding
    # A decode Program that no graph can hold is not used.
    return image if image.program is decode_runner(engine).program else engine.image


def decode_program(engine: CausalLMEngine) -> Program:
    """The Program of decode steps."""
    return decode_runner(engine).program
