"""The part of ``tilewright inspect --html`` on what quantization cost: facts, and two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from ...codegen.program import Json
from ..quality.table import WORST, quality_facts, rows_of, skip_options
from ..tune_report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Mark, Scale
from ..tune_report.page import render

Row = Mapping[str, Json]


def quality_section(report: Mapping[str, Json]) -> str:
    """HTML of ``report["quantization"]``; nothing for an engine that is not quantized."""
    facts = report.get("quantization")
    if not isinstance(facts, dict):
        return ""
    layers, damages = rows_of(facts, "layers"), rows_of(facts, "sensitivity")
    marked = {str(row["name"]) for row in damages[:WORST]}
    order = [str(row["name"]) for row in layers]
    template = (files(__package__) / "page" / "page.quality.html").read_text("utf-8")
    return render(
        template,
        facts=list(quality_facts(facts)),
        layers=sorted(layers, key=lambda row: -float(str(row["output"]))),
        damages=damages,
        errors=error_chart(layers, marked),
        damage=damage_chart(damages, order, marked),
        skips=skip_options(damages[:WORST]),
        most=WORST,
    )


def error_chart(layers: Sequence[Row], marked: set[str]) -> Chart | None:
    """The output error of each linear, in percent, in the graph's order; None without any."""
    rows = [(i, str(row["name"]), 100 * float(str(row["output"]))) for i, row in enumerate(layers)]
    return _by_place(rows, "output error, %", "{:.3g}% of its result's norm", marked)


def damage_chart(damages: Sequence[Row], order: Sequence[str], marked: set[str]) -> Chart | None:
    """KL of each linear quantized alone, in the graph's order; None without a scan."""
    place = {name: index for index, name in enumerate(order)}
    rows = [(place[str(r["name"])], str(r["name"]), float(str(r["kl"]))) for r in damages]
    return _by_place(sorted(rows), "KL alone, nats a token", "KL {:.3g} alone", marked)


def _by_place(
    rows: Sequence[tuple[int, str, float]], label: str, told: str, marked: set[str]
) -> Chart | None:
    shown = [row for row in rows if row[2] > 0]  # what has no logarithm lost nothing
    if not shown:
        return None
    x = Scale([index for index, _, _ in shown], (LEFT, WIDTH - RIGHT), log=False)
    y = Scale([value for _, _, value in shown], (HEIGHT - BOTTOM, TOP), log=True)
    marks = tuple(
        Mark(x(i), y(v), "best" if name in marked else "good", f"{name}: {told.format(v)}")
        for i, name, v in shown
    )
    x_ticks = tuple((x(t), f"{t:g}") for t in x.ticks() if t >= 0 and t == int(t))
    return Chart(marks, (), (), x_ticks, _ticks(y), "linear, in order", label)


def _ticks(scale: Scale) -> tuple[tuple[float, str], ...]:
    return tuple((scale(t), f"{t:g}") for t in scale.ticks())
