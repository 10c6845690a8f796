"""The page's part on quantization: what is flagged, and that marks lie where the figures say."""

from __future__ import annotations

import re

import pytest

from tilewright.compiler.inspect.quality_view import damage_chart, error_chart, quality_section
from tilewright.compiler.quality.table import quality_facts
from tilewright.compiler.tune_report.charts import BOTTOM, HEIGHT, TOP, Scale

pytestmark = pytest.mark.quick

LAYERS = [{"name": f"l.{i}", "weight": 0.1, "output": 0.01 * 10**i} for i in range(3)]
SCAN = [
    {"name": f"l.{i}", "kl": 1e-4 * (i + 1), "output": 0.1, "bytes": 10, "pattern": f"l.{i}"}
    for i in (2, 0, 1)
]
QUALITY = {
    "text": "<script>held</script>",
    "held_out": False,
    "tokens": 99,
    "tokens_asked": 500,
    "length": 50,
    "perplexity": 11.0,
    "base_perplexity": 10.0,
    "change": 0.1,
    "kl": 0.05,
    "top1": 0.9,
    "layers": LAYERS,
    "sensitivity": SCAN,
}
FACTS = {
    "scheme": "int4",
    "method": "rtn",
    "group": 32,
    "symmetric": False,
    "linears": 3,
    "parameters": 3e6,
    "bytes": 2e6,
    "bytes_before": 12e6,
    "bits_per_weight": 4.75,
    "source_in_four_bits": True,
    "quality": QUALITY,
}


def test_the_section_shows_and_flags_what_the_table_does():
    text = quality_section({"quantization": FACTS})
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert text.count('class="flag"') == 2
    for _, fact in quality_facts(FACTS):
        assert fact.partition("<")[0] in text
    assert "this is no result" in text and "all of it (500 were asked for)" in text
    assert text.count("<circle") == 6 and "--skip l.2 --skip l.0 --skip l.1" in text


def test_an_engine_in_numbers_has_no_section():
    assert quality_section({"quantization": None}) == quality_section({}) == ""
    unmeasured = quality_section({"quantization": {**FACTS, "quality": None}})
    assert "not measured" in unmeasured and "<svg" not in unmeasured


def test_marks_lie_where_the_figures_say():
    chart = error_chart(LAYERS, {"l.1"})
    scale = Scale([1.0, 10.0, 100.0], (HEIGHT - BOTTOM, TOP), log=True)
    assert [mark.y for mark in chart.marks] == pytest.approx([scale(v) for v in (1, 10, 100)])
    assert [mark.kind for mark in chart.marks] == ["good", "best", "good"]
    assert [text for _, text in chart.y_ticks] == ["1", "10", "100"]
    alone = damage_chart(SCAN, ["l.0", "l.1", "l.2"], set())
    assert [re.match("l.[0-9]", mark.title)[0] for mark in alone.marks] == ["l.0", "l.1", "l.2"]
    assert error_chart([{"name": "l", "weight": 0.0, "output": 0.0}], set()) is None
