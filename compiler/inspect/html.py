"""``tilewright inspect --html``: one page that holds all it shows, as JSON, and fetches nothing."""

from __future__ import annotations

import json
from importlib.resources import files

from ...codegen.program import Call
from ...runtime.image import EngineImage
from ...version import __version__
from .drawing import draw_graph, op_class
from .facts import (
    Setting,
    fallback_lines,
    final_graph,
    headline,
    kv_bytes_per_token,
    op_label,
    pass_rows,
    weight_bytes,
    weight_sizes,
)
from .kernels import kernel_name
from .memory import memory_plan
from .text import as_data, settings

PAGE = "page"
MOST_WEIGHTS = 12


def render_page(image: EngineImage) -> str:
    """The page as HTML text.

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
        "DATA": data.replace("<", "\\u003c"),
    }
    for name, part in parts.items():
        text = text.replace(f"@@{name}@@", part)
    return text


def page_data(image: EngineImage) -> dict[str, object]:
    """All that the page shows, as plain data."""
    chosen, graph = settings(image), final_graph(image)
    data = as_data(image)
    labels = [_call_label(call) for call in image.program.calls]
    classes = {
        name: op_class(node.op) for node in graph.calls() for name in (node.op, op_label(node))
    }
    return {
        "version": __version__,
        "name": image.name,
        "facts": headline(image),
        "settings": [[s.name, s.tokens, s.context] for s in chosen],
        "passes": pass_rows(image),
        "graphs": [{"name": name, "text": text} for name, text in image.graphs],
        "drawing": draw_graph(graph, image, chosen),
        "state": list(graph.state),
        "costs": data["costs"],
        "classes": {**{label: op_class(op) for label, op in labels}, **classes},
        "kernels": data["kernels"],
        "steps": data.get("steps"),
        "memory": {setting.name: _memory(image, setting) for setting in chosen},
        "weights": weight_sizes(image)[:MOST_WEIGHTS],
        "weight_count": len(image.weights),
        "weight_bytes": weight_bytes(image),
        "kv_per_token": kv_bytes_per_token(image),
        "context": image.lm.max_model_len if image.lm is not None else 0,
        "notes": fallback_lines(image),
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
