"""The HTML page: whole, self-contained, and true to the engine."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_running import run
from tilewright.codegen.persistent.trace import StepTrace


class Page(HTMLParser):
    """Ids, and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.fetches: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            if name in ("src", "srcset", "data") or (name == "href" and not value.startswith("#")):
                self.fetches.append(f"{tag} {name}={value}")
        assert tag not in ("link", "iframe", "img", "object")


@pytest.fixture(scope="module")
def page(engine, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    result = run("inspect", engine, "--html", path)
    assert result.exit_code == 0, result.stderr
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    return path.read_text("utf-8")


def page_data(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_nothing_is_fetched(page):
    parsed = Page(page)
    assert parsed.fetches == []
    assert "http://" not in page and "https://" not in page
    assert "@import" not in page and "url(" not in page and "@@" not in page


def test_a_trace_of_one_launch_has_a_section_of_its_own(page, engine, tmp_path):
    trace, path = tmp_path / "trace.json", tmp_path / "page.html"
    step = StepTrace("tiny", ("begin",), (0,), (0,), ((0, 1, 2),))
    trace.write_text(step.to_json(), "utf-8")
    assert run("inspect", engine, "--html", path, "--trace", trace).exit_code == 0
    assert "step" in Page(path.read_text("utf-8")).ids - Page(page).ids
    refused = run("inspect", engine, "--trace", trace)
    assert refused.exit_code == 2 and "--html" in refused.stderr


def test_every_section_is_there(page):
    ids = {"facts", "graph", "drawing", "passes", "timeline", "texts", "calls", "ops", "kernels"}
    assert ids | {"memory", "bars", "arena", "notes"} <= Page(page).ids


def test_the_data_is_the_engines(page, engine):
    data = page_data(page)
    paths = [*sorted((engine / "graphs").glob("*.txt"))]
    paths += [*sorted((engine / "graphs" / "decode").glob("*.txt"))][1:]
    texts = [path.read_text() for path in paths]
    assert [graph["text"] for graph in data["graphs"]] == texts
    drawing = data["drawings"][data["drawn"]["prefill"]]
    drawn = sum(
        block["repeat"] * sum("cost" in node for node in block["nodes"]) for block in drawing
    )
    program = json.loads((engine / "program.json").read_text())
    # Constants are calls of the eager backend, but drawn within their users.
    assert drawn == sum(call["kernel"] != "eager/const" for call in program["calls"])


def test_values_that_are_alive_together_do_not_overlap(page):
    boxes = page_data(page)["memory"]["prefill"]["boxes"]
    assert boxes
    for i, (_, _, a, b, low, size) in enumerate(boxes):
        for _, _, c, d, other, length in boxes[:i]:
            together = a <= d and c <= b
            assert not together or low + size <= other or other + length <= low


def test_text_of_a_model_cannot_leave_the_data(engine, tmp_path):
    from dataclasses import replace

    from tilewright.compiler.inspect.html import render_page
    from tilewright.runtime.folder import load_image

    image = load_image(engine)
    report = {**image.report, "fallbacks": ["</script><img src=x>"]}
    text = render_page(replace(image, report=report))
    assert "</script><img" not in text
    assert "fallback: </script><img src=x>" in page_data(text)["notes"]


LAYERS = """def model(token_ids: i64[T]):
    table: f32[32, 8] = param("embed.weight")
    embedding_0: f32[T, 8] = embedding(table, token_ids)
    h_0_weight: f32[8, 8] = param("h.0.mlp.weight")
    linear_0: f32[T, 8] = linear(embedding_0, h_0_weight)
    add_0: f32[T, 8] = add(embedding_0, linear_0)
    h_1_weight: f32[8, 8] = param("h.1.mlp.weight")
    linear_1: f32[T, 8] = linear(add_0, h_1_weight)
    add_1: f32[T, 8] = add(add_0, linear_1)
    h_2_weight: f32[8, 8] = param("h.2.mlp.weight")
    linear_2: f32[T, 8] = linear(add_1, h_2_weight)
    add_2: f32[T, 8] = add(add_1, linear_2)
    relu_0: f32[T, 8] = relu(add_2)
    linear_3: f32[T, 32] = linear(relu_0, table)
    return {"logits": linear_3}
"""


@pytest.mark.quick
def test_layers_alike_are_one_block():
    from tilewright.compiler.inspect.layers import split_layers
    from tilewright.ir.parser import parse_graph

    blocks = split_layers(parse_graph(LAYERS))
    found = [(b.title, b.repeat, [node.op for node in b.nodes]) for b in blocks]
    assert found == [
        ("before the layers", 1, ["embedding"]),
        ("layers 0 to 2", 3, ["linear", "add"]),
        ("after the layers", 1, ["relu", "linear"]),
    ]
    other = LAYERS.replace(
        "linear_1: f32[T, 8] = linear(add_0, h_1_weight)\n",
        "linear_1: f32[T, 8] = linear(add_0, h_1_weight, table_0)\n",
    ).replace("    linear_1:", '    table_0: f32[8] = param("h.1.mlp.bias")\n    linear_1:')
    titles = [block.title for block in split_layers(parse_graph(other))]
    assert titles == ["before the layers", "layer 0", "layer 1", "layer 2", "after the layers"]
    plain = LAYERS.replace("h.0.", "a.").replace("h.1.", "b.").replace("h.2.", "c.")
    assert [block.title for block in split_layers(parse_graph(plain))] == ["graph"]


@given(st.integers(2, 24), st.data())
def test_layouts_keep_nodes_apart_and_edges_downward(count, data):
    from tilewright.compiler.inspect.layout import GAP, lay_out

    pairs = st.tuples(st.integers(0, count - 2), st.integers(1, count - 1))
    edges = sorted({(a, b) for a, b in data.draw(st.lists(pairs, max_size=40)) if a < b})
    widths = {n: data.draw(st.floats(40, 200)) for n in range(count)}
    layout = lay_out(range(count), edges, widths)
    for a in range(count):
        for b in range(a):
            (x, y), (u, v) = layout.places[a], layout.places[b]
            room = (widths[a] + widths[b]) / 2 + GAP
            assert y != v or abs(x - u) >= room - 1e-6
    assert all(layout.places[a][1] < layout.places[b][1] for a, b in edges)
    assert all(x - widths[n] / 2 + 1e-6 >= 0 for n, (x, _) in layout.places.items())
