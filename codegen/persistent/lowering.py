"""A decode Program that takes one launch where it has one sequence, and its own calls elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from ...errors import UnsupportedError
from ...ir.graph import Graph
from ...targets import Target
from ..base import Lowered
from ..program import Call, Program
from ..triton.backend import PERSISTENT_PREFIX
from ..triton.package import KernelPackage, launch_key
from ..triton.source import KernelSource
from .decode import INPUTS, weight_names
from .generate import Tiling
from .reading import Shape, read_decode
from .source import compile_persistent, persistent_source

_NARROW = 2048  # columns of a weight
_CPU = Tiling(rows=8, num_warps=1, ahead=1, splits=4, block_n=16, programs=1)


def with_one_launch(
    lowered: Lowered, graph: Graph, target: Target, tiling: Tiling | None = None
) -> Lowered:
    """A decode Program whose steps of one sequence are one launch and the sampling.

    Args:
        lowered: the Program of ``graph``, a fused decode graph.
        graph: what it computes.
        target: a GPU, or the CPU for Triton's interpreter.
        tiling: how the kernel is cut; the default is for the target.

    Raises:
        UnsupportedError: a call that the one launch does not know, which is named; a kernel that
            Triton does not compile.
    """
    shape = read_decode(graph)
    tiling = tiling or tiling_for(target, shape)
    source = persistent_source(shape, tiling, device=not target.is_cpu)
    package = _package(source, target)
    program = lowered.program
    call = _call(program, shape, tiling, graph, package.id)
    notes = (*lowered.notes, "steps of one sequence decode in one launch (experimental)")
    calls = _beside(program, call)
    files = {**lowered.files, **package.files()}
    return replace(lowered, program=replace(program, calls=calls), files=files, notes=notes)


def tiling_for(target: Target, shape: Shape) -> Tiling:
    """The default cut: a program a multiprocessor, all of them resident; not measured yet.

    Rows of a narrow model leave most threads of a wide chunk idle, and tiles of 16 rows most
    multiprocessors.
    """
    if target.is_cpu:
        return _CPU
    if max(form.k for form in shape.products) <= _NARROW:
        return Tiling(rows=4, num_warps=4, programs=target.sms)
    return Tiling(programs=target.sms)


def _package(source: KernelSource, target: Target) -> KernelPackage:
    if target.is_cpu:
        return KernelPackage(source, {})
    (binary,) = compile_persistent([source], target.arch)
    (launch,) = source.variants[0].launches
    return KernelPackage(source, {launch_key(launch): binary})


def _call(program: Program, shape: Shape, tiling: Tiling, graph: Graph, id: str) -> Call:
    """The one launch: inputs and caches in, logits and the same caches out."""
    outputs = dict(program.outputs)
    caches = cache_names(shape)
    taken = (*INPUTS, *caches)
    results = ("logits", *caches)
    if not {*taken} <= {*program.inputs} or not {*results} <= {*outputs}:
        raise UnsupportedError(
            "one launch for all layers",
            expected=f"a Program with inputs {', '.join(INPUTS)}, caches, and their outputs",
            found=f"inputs {', '.join(program.inputs)}",
            remedy="Its decode steps run as a graph of separate kernels.",
        )
    return Call(
        f"{PERSISTENT_PREFIX}{id}",
        taken,
        tuple(outputs[name] for name in results),
        {"graph": str(graph), **asdict(tiling)},
        tuple(weight_names(shape)),
        tuple((1 + index, len(INPUTS) + index) for index in range(len(caches))),
        origin=("one launch",),
    )


def cache_names(shape: Shape) -> tuple[str, ...]:
    """The caches of keys and values, by the names of the graph's inputs, in order."""
    return tuple(name for step in shape.calls for name in step.caches if name)


def _beside(program: Program, one: Call) -> tuple[Call, ...]:
    """The Program's calls with ``one`` in front of those behind the logits: each of the others is
    made where there are more sequences.
    """
    batch = program.buffers["token_ids"].shape[0]
    made, found = program.calls, []
    last = max(i for i, call in enumerate(made) if one.results[0] in call.results)
    for call in made[: last + 1]:
        is_constant = not call.operands and not call.constants and not call.guard
        found.append(call if is_constant else replace(call, guard=(*call.guard, batch - 2)))
    alone = replace(one, guard=(1 - batch,))
    rest = made[last + 1 :]
    given = {*program.inputs, *program.weights, *one.results}
    for call in rest:
        if not _known(call.operands) <= given:
            raise UnsupportedError(
                f"one launch for all layers: {call.kernel} behind the logits",
                expected="a call of logits and inputs",
                found=f"operands {', '.join(sorted(_known(call.operands) - given))}",
                remedy="Its decode steps run as a graph of separate kernels.",
            )
        given |= {*call.results}
    return (*found, alone, *rest)


def _known(operands: Iterable[str | None]) -> set[str]:
    return {name for name in operands if name is not None}
