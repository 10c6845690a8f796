"""A picture of one launch for all layers: what each multiprocessor does within a step."""

from __future__ import annotations

import html

import torch

from tilewright.codegen.persistent.decode import MARKS
from tilewright.codegen.persistent.reading import Attention, Begin, Product, Shape

_ROW, _WIDTH = 5, 1800  # pixels: of a program's line, and of the whole
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
_IDLE = "#d0d0d0"


def picture(timeline: torch.Tensor, shape: Shape, title: str, calls: range | None = None) -> str:
    """A page with a line for each program, a colour for each form of call, grey where it waits.

    Args:
        timeline: i64 [programs, calls, 3] in ns (`MARKS`).
        shape: whose calls they are.
        title: what was run.
        calls: those that are drawn; all by default.
    """
    shown = calls or range(len(shape.calls))
    times = timeline[:, shown.start : shown.stop].double().cpu() * 1e-3
    met, begun, done = (times[:, :, MARKS.index(name)] for name in MARKS)
    start = float(met.min())
    span = max(float(done.max()) - start, 1e-3)
    drawn: dict[str, list[str]] = {_IDLE: []}
    sums = [0.0] * len(shape.forms)
    for column, step in enumerate(shape.calls[shown.start : shown.stop]):
        colour = _COLOURS[step.form % len(_COLOURS)]
        sums[step.form] += float((done - begun)[:, column].sum())
        for line in range(len(times)):
            for first, last, paint in (
                (met[line, column], begun[line, column], _IDLE),
                (begun[line, column], done[line, column], colour),
            ):
                box = _box(float(first) - start, float(last - first), line, _WIDTH / span)
                drawn.setdefault(paint, []).append(box)
    whole = span * len(times)
    waits = float((begun - met).sum())
    legend = [_legend(_IDLE, "waits for the call before", waits / whole)]
    legend += [
        _legend(_COLOURS[index % len(_COLOURS)], _name(form), sums[index] / whole)
        for index, form in enumerate(shape.forms)
    ]
    paths = "".join(f'<path fill="{p}" d="{"".join(boxes)}"/>' for p, boxes in drawn.items())
    size = f'width="{_WIDTH}" height="{_ROW * len(times)}"'
    heading = f"{html.escape(title)}: {span:.1f} µs, {len(times)} programs"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{heading}</title><body>'
        f"<h3>{heading}</h3><p>{' '.join(legend)}</p><svg {size}>{paths}</svg></body>\n"
    )


def _box(start: float, width: float, line: int, scale: float) -> str:
    x, wide = start * scale, max(width, 0.0) * scale
    return f"M{x:.1f} {line * _ROW}h{wide:.1f}v{_ROW - 1}h-{wide:.1f}z" if wide >= 0.05 else ""


def _legend(colour: str, name: str, share: float) -> str:
    return f'<span style="color:{colour}">&#9632;</span> {html.escape(name)} {share:.1%}'


def _name(form: Begin | Product | Attention) -> str:
    if isinstance(form, Begin):
        return "embedding, cos and sin"
    if isinstance(form, Attention):
        return f"attention of {form.heads}/{form.kv_heads} heads"
    more = [word for word in ("norm", "gated", "residual", "chosen") if getattr(form, word)]
    return " ".join((f"{form.n} x {form.k}", *more))
