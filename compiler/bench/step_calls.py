"""The calls of an engine's step, each distinct one once: operands, and what the schemas count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...codegen.lowering import Buffers
from ...codegen.triton.layout import located
from ...codegen.triton.library import views_of
from ...errors import UsageError
from ...ir.dims import evaluate
from ...ir.interpreter import resolve_attr
from ...ir.node import Node
from ...ir.schema import schema
from ...runtime.engine import CausalLMEngine
from ..inspect.call_nodes import nodes_of_calls
from ..inspect.facts import final_graph
from ..regress.timing.problems import Operands, Problem, record_problems
from ..regress.timing.steps import StepSetting
from .decoding import decode_image, decode_runner

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class StepCall:
    """One distinct call of a step.

    Attributes:
        problem: the call, its operands, and how often the step makes it.
        nodes: of the graph, which it computes.
        buffers: names of the graph's values.
        flops, bytes: of one call, as the ops' schemas count them for sequences of the setting's
            length; pages that no sequence has are left out.
        written: of the bytes, those of results that are no operand's.
    """

    problem: Problem
    nodes: tuple[Node, ...]
    buffers: Buffers
    flops: int
    bytes: int
    written: int

    @property
    def name(self) -> str:
        """The kernel's name without hashes, numbered where several bear it."""
        return self.problem.subject

    @property
    def ops(self) -> tuple[str, ...]:
        """What it computes."""
        return self.problem.call.origin or tuple(node.op for node in self.nodes)

    def arguments(self, operands: Operands) -> Operands:
        """The values of its node's arguments, as views of the call's operands.

        Raises:
            LookupError: the call is not of one node, or is not given one of its arguments.
        """
        if len(self.nodes) != 1:
            raise LookupError(f"it computes {len(self.nodes)} nodes")
        node, sizes = self.nodes[0], self.problem.sizes
        named = dict(zip(self.problem.call.operands, operands, strict=True))
        found: list[torch.Tensor | None] = []
        for index, (arg, view) in enumerate(zip(node.args, views_of(node.args), strict=True)):
            if arg is not None and located(arg)[0] not in self.buffers.names:
                found.append(operands[index])  # between two calls of one node: dense
                continue
            name = self.buffers.one(arg)
            if arg is None or name in named:
                found.append(named.get(name))
                continue
            base = named.get(self.buffers.one(located(arg)[0]))
            if base is None or view is None:
                raise LookupError(f"it is not given {name}")
            shape, offset, strides = resolve_attr(view, sizes)
            found.append(base.as_strided(shape, strides, base.storage_offset() + offset))
        return tuple(found)


def step_setting(phase: Phase, batch: int, context: int) -> StepSetting:
    """A step of so many sequences, each of so many tokens when it is done."""
    tokens = 1 if phase == "decode" else context
    return StepSetting(f"{phase} b{batch}", batch, tokens, context)


def record_calls(
    engine: CausalLMEngine, phase: Phase, setting: StepSetting, only: Sequence[str] = ()
) -> list[StepCall]:
    """Runs a step, and keeps each distinct call that computes.

    Args:
        engine: running.
        phase: whose Program runs it.
        setting: of the step.
        only: names of kernels or of ops to keep, all if empty.

    Raises:
        UsageError: a name in ``only`` that no call has; the message lists those that there are.
    """
    decodes = phase == "decode"
    image = decode_image(engine) if decodes else engine.image
    runner = decode_runner(engine) if decodes else engine.runner
    graph = final_graph(image)
    made = nodes_of_calls(graph, image.program)
    nodes = {id(call): each for call, each in zip(image.program.calls, made, strict=True)}
    buffers = Buffers(graph)
    assert image.lm is not None
    page = image.lm.page_size
    found = [
        _step_call(problem, nodes.get(id(problem.call), ()), buffers, setting, page)
        for problem in record_problems(engine, setting, runner)
    ]
    return _chosen(found, only)


def _step_call(
    problem: Problem,
    nodes: tuple[Node, ...],
    buffers: Buffers,
    setting: StepSetting,
    page_size: int,
) -> StepCall:
    # Of the caches counts what the step's sequences hold: to the token where the page size is a
    # symbol, else to the page.
    page = 1 if "P" in problem.sizes else page_size
    tokens = setting.sequences * setting.context
    held = {"N": -(-tokens // page), "M": -(-setting.context // page), "P": 1}
    sizes = {**problem.sizes, **{n: size for n, size in held.items() if n in problem.sizes}}
    flops = moved = written = 0
    for node in nodes:
        spec = schema(node.op)
        cost = spec.cost(node)
        counted = evaluate(cost.flops, sizes)
        if node.op in ("paged_attention", "scaled_paged_attention"):
            counted = round(counted * _seen(node, setting) / (held["M"] * page))
        flops += counted
        moved += evaluate(cost.bytes, sizes)
        in_place = {result for result, _ in spec.aliases}
        results = [t for index, t in enumerate(node.types) if index not in in_place]
        written += sum(evaluate(result.nbytes, sizes) for result in results)
    return StepCall(problem, nodes, buffers, flops, moved, written)


def _seen(node: Node, setting: StepSetting) -> float:
    """The tokens that a new one sees, on average: the schema counts all that the pages can hold."""
    if not node.attr("causal"):
        return setting.context
    return setting.context - (setting.tokens - 1) / 2


def _chosen(calls: Sequence[StepCall], only: Sequence[str]) -> list[StepCall]:
    known: Mapping[str, set[str]] = {
        call.name: {call.name, call.name.partition("#")[0], *call.ops} for call in calls
    }
    for name in only:
        if not any(name in names for names in known.values()):
            valid = sorted({each for names in known.values() for each in names})
            raise UsageError(
                "option --only",
                expected=f"names of kernels or ops of the step: {', '.join(valid)}",
                found=repr(name),
                remedy="Choose some of those, or leave it out.",
            )
    return [call for call in calls if not only or known[call.name] & {*only}]
