"""Runs configs of a kernel on a GPU, in a worker process of the tuner (autotune/worker.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ....autotune.space import Config
from ....ir.dtypes import DType
from ....ir.graph import input_name
from ....ir.interpreter import interpret
from ....ir.node import Node
from ....ir.parser import parse_graph
from ....ir.schema import schema
from ....ir.widen import widened
from ....targets import Target
from ...base import Kernel
from ...program import Call, Program
from ..aot import compile_sources
from ..launch import LaunchedKernel
from ..library import PREFIX, LibraryKernel
from ..package import KernelPackage, kernel_id
from .problem import bases_of, call_of
from .registry import template_named
from .template import Calls

COLD = 4
"""Operands that calls take in turn are so many times the L2, together."""

_MOST_COPIES, _MOST_BYTES = 64, 8 << 30
_LEAST_COPIES = 4  # a kernel's time depends on where its operands lie
_SHORTEST = 0.7e-3  # seconds of a replay
_BUSY_BYTES = 256 << 20
"""What is written before each replay, some 0.1 ms: a device that waits while the host launches a
graph starts late, and slower. Without it the ratio of two configs' replays varied by 2.5% from
round to round on an H100, and from process to process by up to 2%."""

_WARM_SECONDS = 0.2  # until the clocks of a device that was idle are up
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest error over the largest magnitude, against float64."""


def build(spec: Mapping[str, Any]) -> KernelRunner:
    """The runner of a problem, as `KernelTunable.runner` describes it."""
    return KernelRunner(spec)


class _CheckedKernel(LaunchedKernel):
    """A kernel whose results are NaN before it runs, where ``poisons`` is set."""

    poisons = False

    def _result(
        self, index: int, shape: tuple[int, ...], operands: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        result = super()._result(index, shape, operands)
        if self.poisons and index not in self.aliases and result.is_floating_point():
            result.fill_(math.nan)
        return result


class _CheckedCalls:
    """A Program of library calls and kernels of ours, in the place of one kernel.

    Args:
        calls: what computes the node.
        node: whose operands it is given.
        arch: what kernels are compiled for.
        device: where the operands are.
    """

    poisons = False

    def __init__(self, calls: Calls, node: Node, arch: int, device: torch.device) -> None:
        self.program, sources = calls
        packages = compile_sources(list(sources), arch)
        compiled = {kernel_id(p.source): p for p in packages}
        self.steps = [(c, _loaded(c, self.program, compiled, device)) for c in self.program.calls]
        names = [None if base is None else input_name(base) for base in bases_of(node)]
        self.places = [(name, names.index(name)) for name in self.program.inputs]

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        values = {name: operands[place] for name, place in self.places}
        for call, kernel in self.steps:
            if isinstance(kernel, _CheckedKernel):
                kernel.poisons = self.poisons
            given = [None if name is None else values[name] for name in call.operands]
            values.update(zip(call.results, kernel(given, sizes), strict=True))
            for name in call.frees:
                values.pop(name, None)
        found = [values[buffer] for _, buffer in self.program.outputs]
        return [value for value in found if value is not None]


def _loaded(
    call: Call, program: Program, packages: Mapping[str, KernelPackage], device: torch.device
) -> Kernel:
    if call.kernel.startswith(PREFIX):
        return LibraryKernel(call, strict=True)
    package = packages[call.kernel.rpartition("/")[2]]
    results = [program.buffers[name] for name in call.results]
    return _CheckedKernel(package, results, call.aliases, device)


class KernelRunner:
    """One problem on the current GPU.

    Args:
        spec: ``template`` (its name), ``graph`` (text of the problem), ``sizes`` (values of the
            symbols), ``target``.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.template = template_named(str(spec["template"]))
        self.graph = parse_graph(str(spec["graph"]))
        self.node = call_of(self.graph)
        self.sizes = {str(name): int(size) for name, size in spec["sizes"].items()}
        self.target = Target.parse(str(spec["target"]))
        self.device = torch.device("cuda", torch.cuda.current_device())
        first = self.template.operands(self.node, self.sizes, self.device, 0)
        self.operands = [first]
        nbytes = sum({id(x): x.nbytes for x in first if x is not None}.values())
        read = max(1, min(nbytes, self._bytes_read()))
        cold = math.ceil(COLD * self.target.l2_bytes / read)
        wanted = max(cold, _LEAST_COPIES, self.template.copies)
        copies = max(1, min(wanted, _MOST_COPIES, _MOST_BYTES // max(nbytes, 1)))
        for seed in range(1, copies):
            self.operands.append(self.template.operands(self.node, self.sizes, self.device, seed))
        self.expected = self._reference()
        self.kernels: dict[Config, _CheckedKernel | _CheckedCalls] = {}
        self.graphs: dict[Config, torch.cuda.CUDAGraph] = {}
        self.calls = 0  # of a replay, the same for all configs
        self.busy = torch.empty(_BUSY_BYTES, dtype=torch.uint8, device=self.device)

    def prepare(self, config: Config) -> None:
        """Compiles (what the parent has compiled is in the cache) and loads a config's kernel, or
        the calls that it stands for.
        """
        calls = self.template.calls(self.node, config, self.target)
        if calls is not None:
            self.kernels[config] = _CheckedCalls(calls, self.node, self.target.arch, self.device)
            return
        source = self.template.source(self.node, config, self.sizes, self.target)
        if source is None:
            raise ValueError(f"{self.template.name} has no kernel for {config}")
        (package,) = compile_sources([source], self.target.arch)
        aliases = schema(self.node.op).aliases
        self.kernels[config] = _CheckedKernel(package, self.node.types, aliases, self.device)

    def check(self, config: Config) -> float:
        """The largest error against float64, in units of what is tolerated; inf for NaN."""
        worst, kernel = 0.0, self.kernels[config]
        kernel.poisons = True
        found = kernel(self.operands[0], self.sizes)
        kernel.poisons = False
        torch.cuda.synchronize()
        for result, expected in zip(found, self.expected, strict=True):
            scale = float(expected.abs().max()) or 1.0
            error = float((result.double() - expected).abs().max()) / scale
            if not math.isfinite(error):  # max() would drop a NaN
                return math.inf
            tolerated = _TOLERANCE.get(result.dtype, 1e-4)
            worst = max(worst, error / max(tolerated, self.template.rounding(self.node)))
        return worst

    def time(self, config: Config, rounds: int) -> list[float]:
        """Seconds of a call in each of ``rounds`` replays of a CUDA graph, operands cold."""
        if not self.calls:
            self.calls = self._calls_of_a_replay(config)
        if config not in self.graphs:
            self.graphs[config] = self._captured(config, self.calls)
        return [self._replayed(self.graphs[config]) / self.calls for _ in range(rounds)]

    def facts(self) -> dict[str, Any]:
        """The device, its clock in MHz and its temperature in °C, where the driver tells."""
        found: dict[str, Any] = {"device": torch.cuda.get_device_name(self.device)}
        for name, read in (("clock", torch.cuda.clock_rate), ("celsius", torch.cuda.temperature)):
            try:
                found[name] = read(self.device)
            except (RuntimeError, ModuleNotFoundError, AttributeError):
                found[name] = None
        return found

    def _bytes_read(self) -> float:
        """By a call: of a cache that sequences do not fill, less than there is."""
        config = self.template.default(self.node, self.sizes, self.target)
        return self.template.work(self.node, config, self.sizes, self.target).dram_bytes

    def _calls_of_a_replay(self, config: Config) -> int:
        copies, ends = len(self.operands), time.monotonic() + _WARM_SECONDS
        graph = self._captured(config, copies)
        seconds = self._replayed(graph)
        while time.monotonic() < ends:
            seconds = self._replayed(graph)
        return copies * max(1, math.ceil(_SHORTEST / seconds))

    def _captured(self, config: Config, calls: int) -> torch.cuda.CUDAGraph:
        kernel, copies = self.kernels[config], len(self.operands)
        for operands in self.operands[:2]:
            kernel(operands, self.sizes)
        graph = torch.cuda.CUDAGraph()
        # A stream of its own: what cuBLAS keeps for a stream is then in this graph's memory, and is
        # not shared with one that goes before it.
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.graph(graph, stream=stream):
            for index in range(calls):
                kernel(self.operands[index % copies], self.sizes)
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def _replayed(self, graph: torch.cuda.CUDAGraph) -> float:
        """Seconds of a replay."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.busy.zero_()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3

    def _reference(self) -> list[torch.Tensor]:
        wide = widened(self.graph, DType.F64)
        bases = dict(zip(bases_of(self.node), self.operands[0], strict=True))
        given = []
        for node, exact in zip(self.graph.inputs, wide.inputs, strict=True):
            value = bases[node]
            assert value is not None, "every input of a problem is the buffer of an operand"
            given.append(value.to(exact.dtype.torch))
        with torch.no_grad():
            return list(interpret(wide, given))
