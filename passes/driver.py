"""The driver of the pipeline: order, verification, timing, dumping, the pass limit. Passes know
none of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from ..errors import TilewrightError, VerificationError
from ..ir.dtypes import DType
from ..ir.graph import Graph, Weight, param_name
from ..ir.interpreter import interpret
from ..ir.node import Node
from ..ir.printer import nested_graphs
from ..ir.verifier import verify
from ..ir.widen import widened
from ..settings import current
from .base import Pass

VerifyLevel = Literal["off", "structure", "sample", "full"]

# Largest error allowed of one pass, relative to the largest magnitude, by element type of the
# output.
PASS_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
# The same where activations are rounded to codes, which is compared in float64: a number that moves
# by a last bit moves a code by a step where it is near a tie, and more codes in each layer behind.
# Of float64's bits none is near in practice.
ROUNDED_TOLERANCE = 1e-6
# Of an engine whose cache holds codes: they move nothing but attention, and are rounded once.
CACHE_TOLERANCE = 1e-2
# Of an engine whose products round: its element type is as it is, and 16-bit numbers that differ in
# their last bit move many codes. Single kernels and ops are held to far less by their tests.
ENGINE_TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass.
        seconds: in the rewrite itself; ``verify_seconds`` in checking it.
        nodes_before, nodes_after: sizes of the graph.
        max_error: relative to the largest magnitude, None where numbers were not compared.
        graph: the result.
    """

    name: str
    seconds: float
    verify_seconds: float
    nodes_before: int
    nodes_after: int
    max_error: float | None
    graph: Graph = field(repr=False)


def run_passes(
    graph: Graph,
    passes: Iterable[Pass],
    *,
    level: VerifyLevel = "structure",
    samples: Sequence[torch.Tensor] | None = None,
    observe: Callable[[PassRecord], None] | None = None,
    first: int = 0,
    loaded: dict[Weight, torch.Tensor] | None = None,
) -> tuple[Graph, list[PassRecord]]:
    """Runs passes in order, and checks each.

    Args:
        graph: the graph to start from.
        passes: what to run.
        level: "off", "structure" (the verifier after each pass), "sample" or "full" (numbers
            before against after).
        samples: one tensor an input of ``graph``; needed for numbers to be compared.
        observe: called after each pass.
        first: number of the first pass, where others came before: for the pass limit and dumps.
        loaded: values of weights, kept to those of the graph that ran last: given to another run
            from a graph that shares them, they need not be loaded again.

    Returns:
        The last graph, and one record a pass.

    Raises:
        VerificationError: a pass whose result is ill-formed or computes something else; it names
            the pass.
    """
    limit, dump = current().pass_limit, current().dump
    checker = _Checker(level, samples, {} if loaded is None else loaded)
    records: list[PassRecord] = []
    checker.start(graph)
    for index, step in enumerate(passes, first):
        if limit is not None and index >= limit:
            break
        started = time.perf_counter()
        result = step.run(graph)
        rewritten = time.perf_counter()
        error = checker.check(step, graph, result)
        record = PassRecord(
            step.name,
            rewritten - started,
            time.perf_counter() - rewritten,
            len(graph.nodes),
            len(result.nodes),
            error,
            result,
        )
        records.append(record)
        _report(record, index, dump)
        if observe is not None:
            observe(record)
        graph = result
    return graph, records


class _Checker:
    """Compares each graph with the one before; values of the last graph are kept, so each graph
    runs once.
    """

    def __init__(
        self,
        level: VerifyLevel,
        samples: Sequence[torch.Tensor] | None,
        loaded: dict[Weight, torch.Tensor],
    ) -> None:
        self.structural = level != "off"
        self.numeric = level in ("sample", "full") and samples is not None
        self.inputs: tuple[torch.Tensor, ...] = tuple(samples or ())
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.loaded = loaded
        self.kept: dict[Weight, torch.Tensor] = {}

    def start(self, graph: Graph) -> None:
        if self.structural:
            verify(graph)
        if self.numeric:
            self.outputs = self._run(graph, self.inputs)

    def check(self, step: Pass, before: Graph, after: Graph) -> float | None:
        if before == after:
            return 0.0 if self.numeric else None
        try:
            if self.structural:
                verify(after)
            return self._compare(step, before, after) if self.numeric else None
        except VerificationError:
            raise
        except TilewrightError as error:
            raise VerificationError(
                f"pass {step.name}",
                expected="a well-formed graph that runs",
                found=str(error),
                remedy="Report it with the graph; TILEWRIGHT_PASS_LIMIT stops before the pass.",
            ) from error

    def _compare(self, step: Pass, before: Graph, after: Graph) -> float:
        inputs = self.inputs
        if step.adapt_inputs is not None:
            inputs = step.adapt_inputs(before, after, inputs)
        outputs = self._run(after, inputs)
        comparable = outputs
        if step.adapt_outputs is not None:
            comparable = step.adapt_outputs(after, inputs, outputs)
        elif len(inputs) == len(self.inputs):
            comparable = outputs
        wanted = self.outputs
        if step.expected is not None:
            wanted = self._run(step.expected(before, after), self.inputs, wide=rounds(after))
        least = ROUNDED_TOLERANCE if rounds(after) else 0.0
        error = largest_error(f"pass {step.name}", wanted[: len(comparable)], comparable, least)
        self.inputs, self.outputs = inputs, outputs
        return error

    def _run(
        self, graph: Graph, inputs: Sequence[torch.Tensor], wide: bool = False
    ) -> tuple[torch.Tensor, ...]:
        if wide or rounds(graph):
            graph = widened(graph, DType.F64)
        for node in graph.params:
            weight = graph.weights[param_name(node)]
            if weight not in self.loaded:
                self.loaded[weight] = weight.load()
        weights = _Cast(graph, self.loaded, self.kept)
        live = {graph.weights[param_name(node)] for node in graph.params}
        for weight in self.loaded.keys() - live:
            del self.loaded[weight]
        for weight in self.kept.keys() - live:
            del self.kept[weight]
        given = [x.to(node.dtype.torch) for x, node in zip(inputs, graph.inputs, strict=True)]
        with torch.no_grad():
            return interpret(graph, given, weights)


@dataclass(frozen=True)
class _Cast(Mapping[str, torch.Tensor]):
    """Weights as a graph declares them, cast when they are asked for: a wider graph's may not fit
    beside one another. Those for which there is room are ``kept`` for the next pass.
    """

    graph: Graph
    loaded: Mapping[Weight, torch.Tensor]
    kept: dict[Weight, torch.Tensor]

    @cached_property
    def types(self) -> Mapping[str, torch.dtype]:
        """By name."""
        return {param_name(node): node.dtype.torch for node in self.graph.params}

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, dtype = self.graph.weights[name], self.types[name]
        found = self.kept.get(weight)
        if found is not None and found.dtype is dtype:
            return found
        value = self.loaded[weight].to(dtype)
        held = sum(other.nbytes for other in self.kept.values())
        if value is not self.loaded[weight] and held + value.nbytes <= _KEPT_SHARE * _host_bytes():
            self.kept[weight] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.types)

    def __len__(self) -> int:
        return len(self.types)


_KEPT_SHARE = 0.25


def _host_bytes() -> int:
    """Memory of the machine; none where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def rounds(graph: Graph) -> bool:
    """Whether activations are rounded to codes in it."""
    rounding = ("quantize_rows", "scaled_linear", "scaled_append_kv")
    return any(node.op in rounding for node in _all_nodes(graph))


def engine_tolerance(graph: Graph) -> float:
    """What to allow of errors in an engine at least: its products may round where the graph lets
    them, and what a cache holds.
    """
    products = any(
        node.op == "scaled_linear" or (node.op == "dequantize" and node.attr("compute") is not None)
        for node in _all_nodes(graph)
    )
    if products:
        return ENGINE_TOLERANCE
    return CACHE_TOLERANCE if rounds(graph) else 0.0


def _all_nodes(graph: Graph) -> Iterator[Node]:
    for each in (graph, *nested_graphs(graph).values()):
        yield from each.nodes


def largest_error(
    culprit: str,
    expected: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    least: float = 0.0,
) -> float:
    """Largest deviation relative to the largest magnitude of each output.

    Codes of a cache that are neighbours agree: a rounding moves what stands between two of them.
    Others may be apart as far as the numbers are that they are made of.

    Args:
        culprit: whom to blame.
        expected: the reference's outputs.
        found: the outputs to compare with them.
        least: an error to allow of floats whatever their type.

    Raises:
        VerificationError: it is above the tolerance of the output's element type, or shapes or
            NaNs differ.
    """
    worst = 0.0
    loosest = max((_tolerance(a.dtype, least) for a in expected), default=0.0)
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(_nans(a), _nans(b)):
            raise _disagreement(
                culprit,
                f"output {index}: {a.dtype} {list(a.shape)}",
                f"{b.dtype} {list(b.shape)} or other NaNs",
            )
        if a.numel() == 0:
            continue
        codes = a.dtype in _CODES and least > 0.0
        tolerance = loosest if codes else _tolerance(a.dtype, least)
        wide_a, wide_b = a.double().nan_to_num(), b.double().nan_to_num()
        scale = wide_a.abs().max().item() or 1.0
        apart = (wide_a - wide_b).abs()
        if codes:
            apart = torch.where((_places(a) - _places(b)).abs() > 1, apart, 0.0)
        error = apart.max().item() / scale
        if error > tolerance:
            raise _disagreement(culprit, f"output {index} within {tolerance:g}", f"{error:.3g}")
        worst = max(worst, error)
    return worst


_CODES = (torch.int8, torch.float8_e4m3fn)


def _tolerance(dtype: torch.dtype, least: float) -> float:
    own = PASS_TOLERANCE.get(dtype, 0.0)
    return max(own, least) if dtype.is_floating_point and dtype not in _CODES else own


def _nans(x: torch.Tensor) -> torch.Tensor:
    """Where NaNs are, which torch does not ask 8-bit floats."""
    return x.float().isnan() if x.dtype.itemsize == 1 else x.isnan()


def _places(codes: torch.Tensor) -> torch.Tensor:
    """Where codes stand among all of their type, so that neighbours are 1 apart: i16."""
    if codes.dtype == torch.int8:
        return codes.to(torch.int16)
    bits = codes.contiguous().view(torch.uint8).to(torch.int16)
    return torch.where(bits > 0x7F, 0x80 - bits, bits)


def _disagreement(culprit: str, expected: str, found: str) -> VerificationError:
    return VerificationError(
        culprit,
        expected=expected,
        found=found,
        remedy="It does not compute what its graph says: report it with the graph.",
    )


def _report(record: PassRecord, index: int, dump: Path | None) -> None:
    debug = current().debug
    if debug >= 1:
        error = "" if record.max_error is None else f", error {record.max_error:.1e}"
        sizes = f"{record.nodes_before} -> {record.nodes_after} nodes"
        print(f"pass {record.name}: {sizes}, {record.seconds * 1e3:.0f} ms{error}", file=sys.stderr)
    if debug >= 5:
        print(record.graph, file=sys.stderr)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{index:03d}-{record.name}.txt").write_text(str(record.graph))
