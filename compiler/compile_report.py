"""What a compile found, as plain data: phases, passes, calls by backend, what fell back and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..codegen.base import Lowered
from ..codegen.program import Json
from ..ir.graph import Graph, param_name
from ..passes.driver import PassRecord
from ..passes.quantize import Recipe
from .capture_types import Captured
from .graphs import LoweredGraphs, Passed
from .lowering import foreign_ops
from .quality.report import Quality
from .quantizing import before_quantizing, quantization_facts, stored_facts
from .sources import Source


def make_report(
    source: Source,
    captured: Captured,
    passed: Passed,
    lowered: LoweredGraphs,
    seconds: Mapping[str, float],
    largest_error: float | None,
    recipe: Recipe | None = None,
    quality: Quality | None = None,
    heads: dict[str, Json] | None = None,
) -> dict[str, Json]:
    """The report that `Engine.report()` gives and ``report.json`` holds.

    Keys: ``model``, ``capture`` (route, notes), ``seconds`` by phase, ``passes``, ``ops`` (calls of
    the general graph by op), ``calls`` (of its Program by what computes them: generated, template
    or library with Triton, aten, else the backend; of calls that stand for one another each
    counts), ``decode_calls`` likewise (none where decode steps have no Program of their own),
    ``decode`` (which way these go and why: compiler/decode_choice.py; None where there are none),
    ``fallbacks`` (notes of the backend), ``aten`` (calls that run as torch defines them),
    ``largest_error`` (relative, of a pass or a Program), ``parameters``, ``weight_bytes``,
    ``quantization`` and ``stored_quantization`` (compiler/quantizing.py; None without),
    ``attention`` (what became of the heads: compiler/heads/report.py; None where they stay). Of a
    causal LM ``backend`` comes on top: which one and why (compiler/backend_choice.py).
    """
    graph, general, decode = passed.final, lowered.general, lowered.decode
    weights = [graph.weights[param_name(node)] for node in graph.params]
    sizes = [_numel(weight.shape) for weight in weights]
    noted = {note.split(":")[0] for note in general.notes}  # what falls back does so in both
    more = [n for n in (decode.notes if decode else ()) if n.split(":")[0] not in noted]
    fallbacks: list[Json] = [*general.notes, *more]
    notes: list[Json] = list(captured.notes)
    passes: list[Json] = [_pass(r) for r in (*passed.records, *passed.decode_records)]
    foreign: list[Json] = [*sorted(foreign_ops(graph))]
    return {
        "model": _model(source),
        "capture": {"route": captured.route, "notes": notes},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "passes": passes,
        "ops": dict(Counter(node.op for node in graph.calls())),
        "calls": _kinds(general),
        "decode_calls": {} if decode is None else _kinds(decode),
        "decode": lowered.steps,
        "fallbacks": fallbacks,
        "aten": foreign,
        "largest_error": largest_error,
        "parameters": sum(
            _numel(weight.shape) for weight in _whole(passed, source).weights.values()
        ),
        "weight_bytes": sum(n * w.dtype.itemsize for n, w in zip(sizes, weights, strict=True)),
        "quantization": None if recipe is None else quantization_facts(passed, recipe, quality),
        "stored_quantization": stored_facts(passed, source, recipe),
        "attention": heads,
    }


def _whole(passed: Passed, source: Source) -> Graph:
    """The graph whose weights are the model's parameters: those before any are cut into parts."""
    quantizes = any(record.name == "quantize" for record in passed.records)
    in_codes = quantizes or source.quantized_by is not None
    return before_quantizing(passed) if in_codes else passed.final


def _model(source: Source) -> Json:
    """Its name and kind; the seed too, where the weights are random."""
    model: dict[str, Json] = {"name": source.name, "kind": source.kind}
    if source.random_weights is not None:
        model["random_weights"] = source.random_weights
    return model


def _kinds(lowered: Lowered) -> dict[str, Json]:
    return dict(Counter(call.kind for call in lowered.program.calls))


def _pass(record: PassRecord) -> Json:
    return {
        "name": record.name,
        "seconds": round(record.seconds, 4),
        "verify_seconds": round(record.verify_seconds, 4),
        "nodes": [record.nodes_before, record.nodes_after],
        "max_error": record.max_error,
    }


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
