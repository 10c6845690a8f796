"""What a step comes to: launches, programs, FLOPs, bytes, roofline and memory at given sizes, and
which kernel has how much of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...codegen.plan import plan_buffers
from ...codegen.program import Call, Program
from ...codegen.triton.invocation import Planned, plan_call
from ...codegen.triton.package import KernelPackage, launch_key
from ...ir.dims import evaluate
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.schema import schema
from ...runtime.decode_graphs import obstacles
from ...runtime.executor import CACHE_PREFIXES
from ...runtime.image import EngineImage, LMConfig
from ...targets import Target
from ..inspect.call_nodes import nodes_of_calls, owners_of_calls
from ..inspect.facts import compute_dtype
from ..inspect.kernels import VIEWS, kernel_name
from ..inspect.layers import split_layers
from .resident import resident_peak
from .snapshot import DECODE

Number = int | float
PREFILL, MIXED = "prefill", "mixed"
_CONTEXT, _PROMPT, _BATCH = 512, 512, 32
_MIXED_BATCH, _TOKENS_EACH = 8, 8


@dataclass(frozen=True, slots=True)
class Phase:
    """A step, by the values of its Program's symbols.

    Attributes:
        name: as rows name it.
        sizes: by symbol.
        decodes: whether every sequence brings one token, so that the decode Program runs it where
            there is one.
    """

    name: str
    sizes: Mapping[str, int]
    decodes: bool = False


@dataclass(frozen=True, slots=True)
class PhaseFacts:
    """What a phase comes to.

    Attributes:
        series: of all its calls.
        parts: launches, FLOPs and bytes of each kernel, by subject.
        running: labels of the binaries that each kernel of ours runs, by subject.
        programs: Triton programs (blocks of threads) of each kernel of ours, by subject.
    """

    series: Mapping[str, Number]
    parts: Mapping[str, tuple[int, int, int]]
    running: Mapping[str, tuple[str, ...]]
    programs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Cost:
    launches: int
    pdl: int
    flops: int
    bytes: int
    seconds: float
    programs: int = 0
    workspace: int = 0
    counters: int = 0
    binaries: tuple[str, ...] = ()


def lm_phases(lm: LMConfig, general: Graph, decode: Graph) -> tuple[Phase, ...]:
    """Decoding one sequence and a batch, a prompt, and chunks of prompts of a batch, as far as the
    engine's limits allow.

    Args:
        lm: the limits.
        general, decode: graphs of the Programs, whose symbols get values.
    """
    page, longest = lm.page_size, lm.max_model_len
    batch = min(_BATCH, lm.max_batch_size)

    def phase(name: str, sequences: int, tokens: int, context: int) -> Phase:
        decodes = name.startswith(DECODE)
        symbols = (decode if decodes else general).symbols
        context = min(context, longest)
        pages = -(-context // page)
        known = {"B": sequences, "R": sequences, "M": pages, "N": sequences * pages, "P": page}
        known["L"] = context
        sizes = {symbol: known.get(symbol, tokens) for symbol in symbols}
        return Phase(name, sizes, decodes)

    found = [phase(DECODE, 1, 1, _CONTEXT)]
    if batch > 1:
        found.append(phase(f"{DECODE}, batch {batch}", batch, batch, _CONTEXT))
    prompt = min(_PROMPT, longest)
    found.append(phase(PREFILL, 1, prompt, prompt))
    mixed = min(_MIXED_BATCH, batch)
    return (*found, phase(MIXED, mixed, mixed * min(_TOKENS_EACH, longest), _CONTEXT))


class Costs:
    """The costs of a Program's calls.

    Args:
        image: the Program, and what it was compiled for.
        graph: that it was made of.
        packages: its kernels by their ids.
        subjects: what reports call each kernel, by `kernel_name`.
        labels: of each binary, by the kernel's id and the launch key.
    """

    def __init__(
        self,
        image: EngineImage,
        graph: Graph,
        packages: Mapping[str, KernelPackage],
        subjects: Mapping[str, str],
        labels: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.image, self.graph, self.packages = image, graph, packages
        self.subjects, self.labels = subjects, labels
        self.program, self.target = image.program, Target.parse(image.target)

    def at(self, phase: Phase) -> PhaseFacts:
        """What the Program comes to in a phase."""
        program = self.program.at(phase.sizes)
        made = nodes_of_calls(self.graph, program)
        costs = [
            self._cost(call, nodes, phase.sizes)
            for call, nodes in zip(program.calls, made, strict=True)
        ]
        plan = plan_buffers(program, phase.sizes)
        workspaces = [cost.workspace for cost in costs]
        series: dict[str, Number] = {
            "launches": sum(cost.launches for cost in costs),
            "pdl launches": sum(cost.pdl for cost in costs),
            "flops": sum(cost.flops for cost in costs),
            "bytes": sum(cost.bytes for cost in costs),
            "roofline": sum(cost.seconds for cost in costs),
            "peak memory": plan.peak,
            "workspace": max(workspaces, default=0),
            "resident peak": resident_peak(program, plan, workspaces)
            + sum(cost.counters for cost in costs),
        }
        layers = sum(name.startswith(CACHE_PREFIXES[0]) for name in self.program.inputs)
        if layers:
            series["launches a layer"] = self._a_layer(program, costs, layers)
        if phase.name.startswith(DECODE):
            series["graph obstacles"] = len(obstacles(self.program))
        named = [
            (self.subjects[kernel_name(call)], cost)
            for call, cost in zip(program.calls, costs, strict=True)
        ]
        return PhaseFacts(series, _parts(named), _running(named), _programs(named))

    def _cost(self, call: Call, nodes: Sequence[Node], sizes: Mapping[str, int]) -> _Cost:
        package = self.packages.get(kernel_name(call))
        flops, moved, seconds = 0, 0, 0.0
        for node in nodes:
            cost = schema(node.op).cost(node)
            some = evaluate(cost.flops, sizes)
            # What is a view to torch is a copy where a kernel of ours makes it.
            free = package is None and node.op in VIEWS
            bytes_ = 0 if free else evaluate(cost.bytes, sizes)
            dtype = compute_dtype(node, self.target)
            flops, moved = flops + some, moved + bytes_
            seconds += self.target.roofline_seconds(some, bytes_, dtype)
        if package is None:
            launches = int(call.kernel.split("/", 1)[1] not in VIEWS)
            return _Cost(launches, 0, flops, moved, seconds)
        results = [self.program.buffers[name] for name in call.results]
        planned = plan_call(package.source, results, sizes)
        return self._planned(package, planned, _Cost(0, 0, flops, moved, seconds))

    def _planned(self, package: KernelPackage, planned: Planned, cost: _Cost) -> _Cost:
        """A call's cost with its launches: how many, which, and how many may start early (PDL)."""
        keys = [launch_key(launch) for launch, _, _ in planned.launches]
        labels = self.labels[package.id]
        return replace(
            cost,
            launches=len(keys),
            pdl=sum(package.binaries[key].pdl for key in keys),
            programs=sum(math.prod(grid) for _, grid, _ in planned.launches),
            workspace=sum(dtype.itemsize * count for dtype, count in planned.workspaces),
            counters=planned.counters * DType.I32.bytes,
            binaries=tuple(labels[key] for key in keys),
        )

    def _a_layer(self, program: Program, costs: Sequence[_Cost], layers: int) -> float:
        """Launches of one layer of the graph; where it has other layers, the step's shared out."""
        launches: Counter[Node] = Counter()
        for nodes, cost in zip(owners_of_calls(self.graph, program), costs, strict=True):
            launches.update(dict.fromkeys(nodes, cost.launches))
        blocks = [b for b in split_layers(self.graph) if b.title.startswith("layer")]
        if sum(block.repeat for block in blocks) != layers:
            return sum(cost.launches for cost in costs) / layers
        return sum(b.repeat * sum(launches[n] for n in b.nodes) for b in blocks) / layers


def _running(named: Iterable[tuple[str, _Cost]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for subject, cost in named:
        if cost.binaries:
            found[subject] = tuple(dict.fromkeys((*found.get(subject, ()), *cost.binaries)))
    return found


def _programs(named: Iterable[tuple[str, _Cost]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for subject, cost in named:
        if cost.programs:
            found[subject] = found.get(subject, 0) + cost.programs
    return found


def _parts(named: Iterable[tuple[str, _Cost]]) -> dict[str, tuple[int, int, int]]:
    parts: dict[str, tuple[int, int, int]] = {}
    for subject, cost in named:
        launches, flops, moved = parts.get(subject, (0, 0, 0))
        parts[subject] = (launches + cost.launches, flops + cost.flops, moved + cost.bytes)
    return parts
