"""``tilewright inspect --html``: one page that holds all it shows, as JSON, and fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from ...codegen.program import Call
from ...ir.graph import Graph
from ...runtime.image import EngineImage
from ...version import __version__
from .drawing import draw_graph, op_class
from .facts import (
    Setting,
    as_run,
    fallback_lines,
    final_graph,
    graph_texts,
    headline,
    kv_bytes_per_token,
    op_label,
    pass_rows,
    weight_bytes,
    weight_sizes,
)
from .kernels import kernel_name
from .memory import memory_plan
from .quality_view import quality_section
from .text import as_data, settings
from .timeline import timeline_section

if TYPE_CHECKING:
    from ...codegen.persistent.trace import StepTrace

PAGE = "page"
MOST_WEIGHTS = 12


def render_page(image: EngineImage, trace: StepTrace | None = None) -> str:
    """The page as HTML text, ``trace`` of a step of one launch among it.

    Raises:
        UsageError: an engine without graph texts.
        GraphError: a graph text that does not parse.
    """
    folder = files(__package__) / PAGE
    text, style, script = (
        (folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    )
    # In a script element only "<" can end the data early; JSON may write it otherwise.
    data = json.dumps(page_data(image), separators=(",", ":"), ensure_ascii=False)
    parts = {
        "TITLE": image.name,
        "STYLE": style,
        "SCRIPT": script,
        "QUALITY": quality_section(image.report),
        "TIMELINE": timeline_section(trace),
        "DATA": data.replace("<", "\\u003c"),
    }
    for name, part in parts.items():
        text = text.replace(f"@@{name}@@", part)
    return text


def page_data(image: EngineImage) -> dict[str, object]:
    """All that the page shows, as plain data."""
    chosen, data = settings(image), as_data(image)
    graphs = {setting.name: final_graph(as_run(image, setting)) for setting in chosen}
    calls = (call for setting in chosen for call in as_run(image, setting).program.calls)
    labels = [_call_label(call) for call in calls]
    classes = {
        name: op_class(node.op)
        for graph in graphs.values()
        for node in graph.calls()
        for name in (node.op, op_label(node))
    }
    return {
        "version": __version__,
        "name": image.name,
        "facts": headline(image),
        "settings": [[s.name, s.tokens, s.context] for s in chosen],
        "passes": pass_rows(image),
        "graphs": [{"name": name, "text": text} for name, text in graph_texts(image)],
        **_drawings(image, graphs, chosen),
        "state": list(final_graph(image).state),
        "costs": data["costs"],
        "classes": {**{label: op_class(op) for label, op in labels}, **classes},
        "kernels": data["kernels"],
        "decode_kernels": data.get("decode_kernels"),
        "steps": data.get("steps"),
        "memory": {setting.name: _memory(image, setting) for setting in chosen},
        "weights": weight_sizes(image)[:MOST_WEIGHTS],
        "weight_count": len(image.weights),
        "weight_bytes": weight_bytes(image),
        "kv_per_token": kv_bytes_per_token(image),
        "context": image.lm.max_model_len if image.lm is not None else 0,
        "notes": fallback_lines(image),
    }


def _drawings(
    image: EngineImage, graphs: Mapping[str, Graph], settings: Sequence[Setting]
) -> dict[str, object]:
    """The graphs as drawings, each with the costs of the settings that it runs, and which of them
    runs each setting.
    """
    if image.decode is None:
        groups: list[list[Setting]] = [list(settings)]
    else:
        groups = [[setting] for setting in settings]
    return {
        "drawings": [draw_graph(graphs[group[0].name], image, group) for group in groups],
        "drawn": {s.name: index for index, group in enumerate(groups) for s in group},
    }


def _call_label(call: Call) -> tuple[str, str]:
    """What a call is named in the memory plan, and the op that gives it its colour."""
    if call.loader != "triton":
        name = call.kernel.split("/", 1)[1]
        return name, name
    fused = call.kind == "generated" and len(call.origin) != 1
    return kernel_name(call), "fused" if fused else "".join(call.origin[:1])


def _memory(image: EngineImage, setting: Setting) -> dict[str, object]:
    arena = memory_plan(image, setting)
    plan, buffers = arena.plan, arena.program.buffers
    return {
        "of_graph": arena.of_graph,
        "calls": [_call_label(call)[0] for call in arena.program.calls],
        "peak": plan.peak,
        "lower_bound": plan.lower_bound,
        "sum": plan.bytes_of("temporary"),
        "live": plan.live_bytes(),
        "boxes": [
            [p.buffer, str(buffers[p.buffer]), p.first, p.last, p.offset, p.padded]
            for p in plan.temporaries
        ],
    }
