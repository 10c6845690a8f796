"""What an engine consists of, as figures: sizes, costs by roofline, passes, notes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...codegen.base import CHOICES
from ...errors import UsageError
from ...ir.dims import evaluate
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.parser import parse_graph
from ...ir.printer import value_names
from ...ir.schema import schema
from ...runtime.executor import CACHE_PREFIXES
from ...runtime.image import EngineImage, LMConfig
from ...targets import Target
from ..heads.table import heads_line

FREE = frozenset({"reshape", "item"})  # a view, in every backend


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes at which costs are evaluated.

    Attributes:
        name: "decode" or "prefill".
        tokens: T, of one sequence.
        context: length of that sequence after the step, in tokens.
    """

    name: str
    tokens: int
    context: int


DECODE, PREFILL = Setting("decode", 1, 512), Setting("prefill", 512, 512)


@dataclass(frozen=True, slots=True)
class CallCost:
    """One node of a graph at one setting.

    Attributes:
        node: the node.
        name: its name in the graph's text.
        flops, bytes: as the op's schema counts them; views move nothing.
        seconds: the least time that the target's peak rates allow.
    """

    node: Node
    name: str
    flops: int
    bytes: int
    seconds: float


def as_run(image: EngineImage, setting: Setting) -> EngineImage:
    """The image with the Program and the graphs that run a setting."""
    return image.decoding if setting.name == DECODE.name else image


def graph_texts(image: EngineImage) -> list[tuple[str, str]]:
    """(name, text) of the graph after each pass: those of the decode graph follow, without the one
    that both have in common.
    """
    decode = () if image.decode is None else image.decode.graphs[1:]
    return [*image.graphs, *decode]


def final_graph(image: EngineImage) -> Graph:
    """The graph that the backend was given, without weights.

    Raises:
        UsageError: an engine that was saved without graph texts.
        GraphError: text that does not parse.
    """
    if not image.graphs:
        raise UsageError(
            f"engine {image.name}",
            expected="the text of its graphs",
            found="none",
            remedy="Compile the model again.",
        )
    return parse_graph(image.graphs[-1][1])


def bindings(graph: Graph, image: EngineImage, setting: Setting) -> dict[str, int]:
    """Values of the graph's symbols: one sequence; symbols that we do not know get the tokens."""
    page = image.lm.page_size if image.lm is not None else 1
    pages = -(-setting.context // page)
    known = {"B": 1, "R": 1, "M": pages, "N": pages, "P": page, "L": setting.context}
    return {name: known.get(name, setting.tokens) for name in graph.symbols}


def call_costs(
    graph: Graph, target: Target, sizes: Mapping[str, int], names: Mapping[Node, str] | None = None
) -> list[CallCost]:
    """The cost of each node that computes, in the graph's order."""
    names = names or value_names(graph)
    found: list[CallCost] = []
    for node in graph.calls():
        cost = schema(node.op).cost(node)
        flops = evaluate(cost.flops, sizes)
        moved = 0 if node.op in FREE else evaluate(cost.bytes, sizes)
        seconds = target.roofline_seconds(flops, moved, compute_dtype(node, target))
        found.append(CallCost(node, names[node], flops, moved, seconds))
    return found


def compute_dtype(node: Node, target: Target) -> str:
    """torch's name of the element type that a node computes in, as the target's rates have it: its
    first result's own, float32 for integers and for types that the device has no rate of.
    """
    dtype = node.types[0].dtype
    name = str(dtype.torch).removeprefix("torch.")
    return name if dtype.is_float and name in dict(target.tflops) else "float32"


def op_label(node: Node) -> str:
    """The op for reading: of a fused body what it does, without the hash in its name."""
    body = node.attr("body")
    if node.op != "fused" or not isinstance(body, Graph):
        return node.op
    return f"fused {re.sub(r'_[0-9a-f]{4,}$', '', body.name)}"


def headline(image: EngineImage) -> list[tuple[str, str]]:
    """The facts that come first, labelled."""
    report = image.report
    facts = [
        ("model", image.name),
        ("target", image.target),
        ("backend", f"{image.backend} ({calls_text(report.get('calls'))})"),
        *_choice_line(report),
        *_decode_line(report),
        *_tuning_line(image),
        *_quantization_line(report),
        *heads_line(report),
        ("weights", f"{number(report.get('parameters'))} parameters, {size(weight_bytes(image))}"),
    ]
    if image.lm is not None:
        per_token = kv_bytes_per_token(image)
        facts += [
            ("KV cache", f"{image.lm.kv_cache}, {kv_dtype(image)}, {size(per_token)} a token"),
            ("context", f"{_context(image.lm)}, {image.lm.max_batch_size} sequences"),
        ]
    seconds = report.get("seconds")
    if isinstance(seconds, dict):
        total = sum(float(str(value)) for name, value in seconds.items() if name != "compile")
        facts.append(("compiled in", f"{total:.1f} s"))
    return facts


def _quantization_line(report: Mapping[str, object]) -> list[tuple[str, str]]:
    found = report.get("quantization")
    if not isinstance(found, dict):
        return []
    bits = f"{float(str(found['bits_per_weight'])):.2f} bits a weight"
    flag = "; no result: the file's own four bits" if found["source_in_four_bits"] else ""
    return [("quantized", f"{found['scheme']} ({found['method']}), {bits}{flag}")]


def _choice_line(report: Mapping[str, object]) -> list[tuple[str, str]]:
    """Why it is this backend, where the user left it open."""
    found = report.get("backend")
    if not isinstance(found, dict) or found["how"] == "named":
        return []
    gain = found["gain"]
    faster = f", {gain:.2f}× the default" if isinstance(gain, float) and gain > 1 else ""
    return [("chosen", f"{found['how']}{faster}: {found['why']}")]


def _decode_line(report: Mapping[str, object]) -> list[tuple[str, str]]:
    calls, way = report.get("decode_calls"), report.get("decode")
    if not calls:
        return []
    why = f"; {way['why']}" if isinstance(way, dict) else ""
    return [("decode steps", f"a Program of their own ({calls_text(calls)}){why}")]


def _tuning_line(image: EngineImage) -> list[tuple[str, str]]:
    """How many cuts of kernels a tuner chose, and how many of those on other terms."""
    lines = [json.loads(line) for line in image.files.get(CHOICES, b"").splitlines()]
    if not any(line["config"] for line in lines):
        return []
    used = [line for line in lines if line["used"]]
    stale = sorted({name for line in used if line["how"] == "stale" for name in line["differs"]})
    text = f"{len(used)} of {len(lines)} cuts are not the default"
    return [("tuning", text + (f", measured under another {', '.join(stale)}" if stale else ""))]


def calls_text(calls: object) -> str:
    """How many kernel calls of each kind a Program has, in words."""
    if not isinstance(calls, dict):
        return "no calls"
    return ", ".join(f"{count} {loader} call{'s'[: count != 1]}" for loader, count in calls.items())


def fallback_lines(image: EngineImage) -> list[str]:
    """What did not go the straight way: notes of capture, fallbacks of the backend, aten calls."""
    report = image.report
    capture = report.get("capture")
    notes = capture.get("notes") if isinstance(capture, dict) else None
    lines = [f"capture: {text}" for text in _texts(notes)]
    lines += [f"fallback: {text}" for text in _texts(report.get("fallbacks"))]
    lines += [f"runs as torch defines it: {text}" for text in _texts(report.get("aten"))]
    return lines


def weight_bytes(image: EngineImage) -> int:
    """Bytes of all weights that the Program uses."""
    return sum(n for _, n in weight_sizes(image))


def weight_sizes(image: EngineImage) -> list[tuple[str, int]]:
    """(name, bytes) of each weight, largest first."""
    sizes = [
        (name, prod(weight.shape) * weight.dtype.itemsize)  # type: ignore[attr-defined]
        for name, weight in image.weights.items()
    ]
    return sorted(sizes, key=lambda pair: -pair[1])


def kv_bytes_per_token(image: EngineImage) -> int:
    """Bytes that one token adds to the KV cache, over all layers."""
    buffers = image.program.buffers
    caches = [buffers[n] for n in image.program.inputs if n.startswith(CACHE_PREFIXES)]
    return sum(
        prod(size for size in type_.shape if isinstance(size, int)) * type_.dtype.bytes
        for type_ in caches
    )


def _context(lm: LMConfig) -> str:
    if lm.window is None:
        return f"{lm.max_model_len} tokens"
    return f"the latest {lm.window} tokens and the first {lm.sinks} of text without end"


def kv_dtype(image: EngineImage) -> str:
    """The element type of the KV cache; of codes, what lies beside them."""
    names = [name for name in image.program.inputs if name.startswith(CACHE_PREFIXES)]
    dtypes = dict.fromkeys(str(image.program.buffers[n].dtype) for n in names if "_cache_" in n)
    scaled = any("_scale_" in name for name in names)
    return "/".join(dtypes) + (" with scales" if scaled else "")


def pass_rows(image: EngineImage) -> list[dict[str, object]]:
    """The passes in order as the report has them."""
    rows = image.report.get("passes")
    return [dict(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def pick_pass(image: EngineImage, wanted: str) -> tuple[str, str]:
    """(title, text) of the graph after a pass, by number or by name: the last one of that name, and
    rather of the general graph than of the decode graph, whose passes come after.

    Raises:
        UsageError: no such pass; the message lists them.
    """
    texts, general = graph_texts(image), len(image.graphs)
    titles = [f"{index:03d}-{name}" for index, (name, _) in enumerate(texts)]
    for index in (*reversed(range(general)), *range(general, len(titles))):
        if wanted in (str(index), titles[index], texts[index][0]):
            return titles[index], texts[index][1]
    raise UsageError(
        f"pass {wanted!r}",
        expected=f"one of {', '.join(titles)}, or its number or name",
        found="no graph of that name",
        remedy="Choose one of those.",
    )


def size(count: float) -> str:
    """Bytes for reading: 513.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def number(value: object) -> str:
    """A count for reading: 134.5 M."""
    if not isinstance(value, int | float):
        return "?"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time for reading: 12.3 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _texts(value: object) -> Sequence[str]:
    return [str(text) for text in value] if isinstance(value, list) else []
