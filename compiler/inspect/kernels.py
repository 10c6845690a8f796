"""The kernels of an engine: what each one is, takes, costs, and how often a step launches it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...codegen.program import Call, Program
from ...codegen.triton.invocation import plan_call
from ...codegen.triton.library import PREFIX as LIBRARY_PREFIX
from ...codegen.triton.package import KernelPackage, launch_key, read_package
from ...errors import UsageError
from ...ir.dims import evaluate
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.schema import schema
from ...runtime.executor import CACHE_PREFIXES
from ...runtime.image import EngineImage
from ...targets import Target
from .call_nodes import nodes_of_calls, owners_of_calls
from .facts import FREE, Setting, as_run, bindings, compute_dtype, final_graph
from .layers import split_layers

VIEWS = FREE | {"const", "permute", "slice", "expand", "dim_value", "share_pages"}
"""Ops that torch answers without a kernel."""


@dataclass(frozen=True, slots=True)
class Step:
    """Calls within one run of the Program, at one setting.

    Attributes:
        launches: on the device; a library or torch call counts as one, whatever it launches.
        flops, bytes: of the nodes that they compute, by their schemas.
        seconds: the least time that the target's peak rates allow.
        binaries: launch keys of the package that run.
    """

    launches: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    binaries: tuple[str, ...] = ()

    def __add__(self, other: Step) -> Step:
        return Step(
            self.launches + other.launches,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            tuple(dict.fromkeys((*self.binaries, *other.binaries))),
        )


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """One kernel of the engine's Programs.

    Attributes:
        name: a package's id, the op of a library call, else as the Program names it.
        kind: as ``Call.kind``.
        origin: the ops that its first call computes.
        calls: how many the Programs have.
        steps: all of them together, by the names of the settings.
        package: text, launch facts and binaries of a kernel of ours.
    """

    name: str
    kind: str
    origin: tuple[str, ...]
    calls: int
    steps: Mapping[str, Step]
    package: KernelPackage | None = None


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Every kernel of an engine.

    Attributes:
        kernels: the one with most roofline time at the first setting first.
        whole: all calls of the Program that runs the setting together, by setting.
        layers: of a causal LM, by its caches; 0 for a module.
        a_layer: launches of one layer by setting, the mean where layers differ.
    """

    kernels: tuple[KernelFacts, ...]
    whole: Mapping[str, Step]
    layers: int
    a_layer: Mapping[str, float]


def kernel_report(image: EngineImage, settings: Sequence[Setting]) -> KernelReport:
    """What the Programs consist of that run the settings.

    Raises:
        EngineError: a kernel's files are missing or damaged.
    """
    runs = {setting.name: as_run(image, setting) for setting in settings}
    packages = {id: one for run in runs.values() for id, one in _packages(run).items()}
    layers = sum(name.startswith(CACHE_PREFIXES[0]) for name in image.program.inputs)
    steps: dict[str, list[Step]] = {}
    a_layer: dict[str, float] = {}
    running: dict[str, Program] = {}
    for setting in settings:
        run = runs[setting.name]
        graph = final_graph(run)
        sizes = bindings(graph, image, setting)
        program = running[setting.name] = run.program.at(sizes)
        made = nodes_of_calls(graph, program)
        one = _At(run, sizes)
        found = steps[setting.name] = [
            one.step(call, nodes, packages.get(kernel_name(call)))
            for call, nodes in zip(program.calls, made, strict=True)
        ]
        if layers:
            owners = owners_of_calls(graph, program)
            a_layer[setting.name] = _a_layer(graph, owners, found, layers)
    kernels = _grouped([run.program for run in runs.values()], running, packages, steps)
    first = settings[0].name
    return KernelReport(
        tuple(sorted(kernels, key=lambda k: (-k.steps[first].seconds, -k.calls, k.name))),
        {name: sum(each, Step()) for name, each in steps.items()},
        layers,
        a_layer,
    )


def kernel_name(call: Call) -> str:
    """What a report calls the kernel of a call: a package's id, or the op of a library."""
    return call.kernel.rsplit("/", 1)[-1] if call.loader == "triton" else call.kernel


def calls_by_function(image: EngineImage, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Bytes of each launch of a step, by the name that its function has on the device.

    Of a call of several launches the first is given all of the bytes. Calls of libraries are left
    out: their functions have names of their own.

    Args:
        image: whose Program runs the step.
        sizes: values of its symbols.
    """
    packages, at, program = _packages(image), _At(image, sizes), image.program.at(sizes)
    found: dict[str, list[int]] = defaultdict(list)
    made = nodes_of_calls(final_graph(image), program)
    for call, nodes in zip(program.calls, made, strict=True):
        package = packages.get(kernel_name(call))
        if package is None:
            continue
        moved = at.step(call, nodes, package).bytes
        for function in at.functions(call, package):
            found[function].append(moved)
            moved = 0
    return dict(found)


def pick_kernel(kernels: Sequence[KernelFacts], wanted: str) -> KernelFacts:
    """A kernel by its name, or by how it begins, hashes left out, if only one begins so.

    Raises:
        UsageError: no such kernel, or several; the message lists the names.
    """
    exact = [kernel for kernel in kernels if kernel.name == wanted]
    alike = [kernel for kernel in kernels if kernel.name.startswith((f"{wanted}-", f"{wanted}_"))]
    for found in (exact, alike):
        if len(found) == 1:
            return found[0]
    raise UsageError(
        f"kernel {wanted!r}",
        expected=f"one of {', '.join(kernel.name for kernel in kernels)}",
        found=f"{len(alike)} that begin so" if alike else "no kernel of that name",
        remedy="Choose one of those.",
    )


def _packages(image: EngineImage) -> dict[str, KernelPackage]:
    kernels = {call.kernel for call in image.program.calls if call.loader == "triton"}
    ids = sorted(k.rsplit("/", 1)[1] for k in kernels if not k.startswith(LIBRARY_PREFIX))
    return {id: read_package(image.files.__getitem__, id) for id in ids}


def _grouped(
    programs: Sequence[Program],
    running: Mapping[str, Program],
    packages: Mapping[str, KernelPackage],
    steps: Mapping[str, Sequence[Step]],
) -> list[KernelFacts]:
    """The kernels of the Programs that run the settings, which make the calls of ``running``."""
    groups: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for program in {id(program): program for program in programs}.values():
        for call in program.calls:
            groups[kernel_name(call), call.kind].append(call)
    sums = {setting: _sums(running[setting], found) for setting, found in steps.items()}
    return [
        KernelFacts(
            *key,
            calls[0].origin,
            len(calls),
            {setting: of.get(key, Step()) for setting, of in sums.items()},
            packages.get(key[0]),
        )
        for key, calls in groups.items()
    ]


def _sums(program: Program, steps: Sequence[Step]) -> dict[tuple[str, str], Step]:
    """All steps of each kernel together, by its name and kind."""
    found: dict[tuple[str, str], Step] = defaultdict(Step)
    for call, step in zip(program.calls, steps, strict=True):
        found[kernel_name(call), call.kind] += step
    return found


def _a_layer(
    graph: Graph, owners: Sequence[Sequence[Node]], steps: Sequence[Step], layers: int
) -> float:
    """Launches of one layer, by the layers of the graph; where their number is another than that
    of the caches, every launch of the step is shared out.
    """
    launches: Counter[Node] = Counter()
    for nodes, step in zip(owners, steps, strict=True):
        launches.update(dict.fromkeys(nodes, step.launches))
    blocks = [block for block in split_layers(graph) if block.title.startswith("layer")]
    if sum(block.repeat for block in blocks) != layers:
        return sum(step.launches for step in steps) / layers
    return sum(b.repeat * sum(launches[n] for n in b.nodes) for b in blocks) / layers


class _At:
    """Steps of single calls at given sizes."""

    def __init__(self, image: EngineImage, sizes: Mapping[str, int]) -> None:
        self.program, self.target = image.program, Target.parse(image.target)
        self.sizes = sizes

    def step(self, call: Call, nodes: Sequence[Node], package: KernelPackage | None) -> Step:
        launches, binaries = self._launches(call, package)
        found = Step(launches, binaries=binaries)
        for node in nodes:
            cost = schema(node.op).cost(node)
            flops = evaluate(cost.flops, self.sizes)
            # What is a view to torch is a copy where a kernel of ours makes it.
            free = package is None and node.op in VIEWS
            moved = 0 if free else evaluate(cost.bytes, self.sizes)
            dtype = compute_dtype(node, self.target)
            seconds = self.target.roofline_seconds(flops, moved, dtype)
            found += Step(0, flops, moved, seconds)
        return found

    def functions(self, call: Call, package: KernelPackage) -> list[str]:
        """The function of each of its launches."""
        results = [self.program.buffers[name] for name in call.results]
        planned = plan_call(package.source, results, self.sizes).launches
        return [launch.function for launch, _, _ in planned]

    def _launches(self, call: Call, package: KernelPackage | None) -> tuple[int, tuple[str, ...]]:
        """How many launches the call makes, and of which binaries."""
        if package is None:
            return int(call.kernel.split("/", 1)[1] not in VIEWS), ()
        results = [self.program.buffers[name] for name in call.results]
        planned = plan_call(package.source, results, self.sizes).launches
        return len(planned), tuple(dict.fromkeys(launch_key(launch) for launch, _, _ in planned))
