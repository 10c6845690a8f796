"""The reports: whatever names and diffs hold, each parses, and says what the comparison says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from comparisons import comparison, comparisons, plots, row, text
from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.compiler.regress.data import (
    ChangePoint,
    Point,
    SeriesPlot,
    comparison_data,
    read_comparison,
)
from tilewright.compiler.regress.junit import render_junit
from tilewright.compiler.regress.markdown import (
    COLUMNS,
    LEAST_LIMIT,
    LIMIT,
    escape,
    render_history,
    render_markdown,
)
from tilewright.compiler.regress.model import Comparison, Diff, Side
from tilewright.compiler.regress.page import gate_band, render_page
from tilewright.compiler.regress.terminal import (
    SHOWN_DIFFS,
    SHOWN_LINES,
    print_comparison,
)
from tilewright.compiler.regress.wording import (
    OF_ONE,
    causes,
    headline,
)
from tilewright.errors import UsageError

GITHUB_LIMIT = 65_536


def tables(markdown: str) -> list[list[list[str]]]:
    """Each table as rows of cells, by a parser that is not ours."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    found: list[list[list[str]]] = []
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(tokens[index + 1].content)
    return found


def lines_of(rows) -> int:
    """Lines of a table: rows that differ in their targets are one, and of one kernel in a row a few
    are shown, and one line says how many more there are.
    """
    first: list = []
    for one in rows:
        if not any(replace(one, target=known.target) == known for known in first):
            first.append(one)
    keys = [(one.case, one.target, one.subject) for one in first]
    lines = at = 0
    for index, key in enumerate(keys):
        at = at + 1 if index and key == keys[index - 1] else 1
        lines += at <= OF_ONE + 1
    return lines


def fences(markdown: str) -> list[str]:
    return [
        token.content
        for token in MarkdownIt("commonmark").parse(markdown)
        if token.type == "fence" and token.info == "diff"
    ]


class Markup(HTMLParser):
    """The tags of a document, those of comments too, in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.fetches: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset") or (name == "href" and not value.startswith("#")):
                self.fetches.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_comment(self, data):
        self.tags.append("comment")


# Markdown


@given(comparisons)
def test_every_table_of_the_comment_has_as_many_cells_as_its_head(found):
    rendered = render_markdown(found)
    assert len(rendered) < GITHUB_LIMIT
    by_verdict = [
        lines_of(found.of(verdict))
        for verdict in (Verdict.REGRESSION, Verdict.MISSING, Verdict.UNDECIDABLE)
    ]
    series = [t for t in tables(rendered) if len(t[0]) == len(COLUMNS)]
    assert [len(t) - 1 for t in series] == [count for count in by_verdict if count]
    # The parser pads short rows and cuts long ones; the bars themselves cannot lie.
    for line in rendered.partition("<details>")[0].splitlines():  # a diff may begin with a bar
        if line.startswith("| "):
            assert line.count("|") in (len(COLUMNS) + 1, 4)


@given(comparisons)
def test_only_our_own_markup_is_in_the_comment(found):
    rendered = render_markdown(found)
    outside = re.sub(r"(?ms)^(`{3,})diff\n.*?^\1$", "", rendered)
    markup = Markup(outside)
    assert set(markup.tags) <= {"code", "/code", "details", "/details", "summary", "/summary"}
    assert markup.tags.count("details") == markup.tags.count("/details")


@given(st.lists(text, min_size=1, max_size=5))
def test_a_diff_cannot_end_its_fence(texts):
    found = comparison(
        diffs=tuple(Diff("c", "t", f"k{i}", "changed", f"+{part}") for i, part in enumerate(texts))
    )
    shown = fences(render_markdown(found))
    assert len(shown) == len(texts)
    for part, content in zip(texts, shown, strict=True):
        lines = re.split("\r\n|\r|\n", f"+{part}")
        printable = [re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", x) for x in lines]
        assert content.rstrip("\n") == "\n".join(printable).rstrip("\n")


@pytest.mark.quick
def test_the_comment_says_first_what_happened_and_to_which_kernel():
    measured = row(
        tier=3, series="time", unit="s", old=1e-3, new=1.04e-3, ratio=Interval(1.04, 1.03, 1.05)
    )
    rendered = render_markdown(
        comparison(
            row(),
            measured,
            row(Verdict.IMPROVEMENT, subject="gemm_fp8", new=32),
            row(Verdict.NO_CHANGE, new=40),
            row(Verdict.MISSING, subject="softmax", new=None),
        )
    )
    first = rendered.splitlines()[0]
    assert first == (
        "**Failed**: 2 regressions, 1 missing, 1 improvement, 1 unchanged, 0 undecided"
    )
    regressions, missing, _ = tables(rendered)
    assert regressions[1][:6] == [
        "<code>rms_norm_bf16</code>", "llama-1b", "h100", "registers", "40 → 48", "1.200×",
    ]  # fmt: skip
    assert regressions[2][4:7] == ["1 ms → 1.04 ms", "1.040× (1.030 to 1.050)", "+0"]
    assert missing[1][4] == "40 → none"
    assert "- <code>gemm_fp8</code> registers (llama-1b on h100): 40 → 32, 0.800×" in rendered
    assert 'tilewright regress record --reason "…"' in rendered
    assert "commit 0123456789ab, recorded 2026-01-02: fused" in rendered


def test_nothing_found_is_a_pass():
    rendered = render_markdown(comparison(row(Verdict.NO_CHANGE, new=40)))
    assert rendered.startswith("**Passed**: 0 regressions, 0 improvements, 1 unchanged")
    assert "Regressions\n" not in rendered


@pytest.mark.quick
def test_a_mention_and_a_reference_notify_nobody():
    for before in ("@team", "#12", "GH-3"):
        assert before not in escape(before)
    assert escape("rms_norm_bf16 a.b") == "rms_norm_bf16 a.b"
    assert "|" not in escape("a|b\\|c") and "`" not in escape("`")


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("count", [1, 3, 300])
@pytest.mark.parametrize("line", ["+x = 1\n", "`" * 50, "🧨", "+" + "ü" * 400 + "\n"])
def test_diffs_are_cut_first_and_the_cut_is_said(size, count, line):
    long = (line * (size // len(line) + 1))[: max(size, len(line))]
    found = comparison(
        *[row(subject=f"k{i}") for i in range(40)],
        diffs=tuple(Diff("c", "t", f"k{i}", "changed", f"{long}{i}") for i in range(count)),
    )
    rendered = render_markdown(found)
    assert len(rendered.encode()) <= LIMIT
    assert len(tables(rendered)[0]) == 41
    whole = sum(f"{long}{i}\n" in rendered for i in range(count))
    cut = len(re.findall(r"Cut: \d+ of \d+ bytes", rendered))
    left_out = sum(map(int, re.findall(r"left out for want of room: (\d+)", rendered)))
    assert whole + cut + left_out == count
    if size > 1:
        assert cut + left_out > 0
    elif count < 300:
        assert whole == count
    assert 'regress record --reason "…"' in rendered


@pytest.mark.parametrize("filler", ["x", "@", "|", "🧨", "@|" * 3])
@pytest.mark.parametrize("limit", [LEAST_LIMIT, 20_000, LIMIT])
def test_the_comment_stays_below_its_limit_when_everything_is_long(filler, limit):
    long, text = filler * 300, filler * 1_000  # each longer than what is shown of it
    side = Side(long, long, long, long, {f"{i}{long}": long for i in range(50)}, long)
    fields = {"case": long, "target": long, "series": long, "owner": long, "note": long}
    everything = [
        row(verdict, subject=f"{i}{long}", **fields) for verdict in Verdict for i in range(80)
    ]
    diffs = tuple(Diff(long, long, f"{i}{long}", "changed", text) for i in range(50))
    rendered = render_markdown(
        Comparison(long, side, side, tuple(everything), diffs, strict=True), limit=limit
    )
    assert len(rendered.encode()) <= limit
    assert "Regressions not shown here: " in rendered
    assert 'regress record --reason "…"' in rendered
    plot = SeriesPlot(long, long, long, long, long, "s", "lower", (), verdict=Verdict.REGRESSION)
    history = render_history([plot] * 500, title=long, limit=limit)
    assert len(history.encode()) <= limit and "not shown here" in history


def test_a_limit_without_room_is_refused():
    with pytest.raises(UsageError, match="at least"):
        render_markdown(comparison(), limit=LEAST_LIMIT - 1)
    with pytest.raises(UsageError, match="at least"):
        render_history([], title="x", limit=10)


@given(st.lists(plots, max_size=4))
def test_a_comment_on_histories_has_a_row_for_each_that_moved(found):
    rendered = render_history(found, title="nightly")
    worse = [p for p in found if p.verdict in (Verdict.REGRESSION, Verdict.MISSING)]
    moved = [p for p in found if p.change_points and p not in worse]
    assert [len(t) - 1 for t in tables(rendered)] == [len(x) for x in (worse, moved) if x]
    assert rendered.startswith("**Failed**" if worse else "**Passed**")


def changed(subject: str, note: str, **values):
    known = {"tier": 1, "series": "source", "old": None, "new": None, "better": "equal"}
    return row(Verdict.CHANGED, subject=subject, note=note, **{**known, **values})


@pytest.mark.quick
def test_what_changed_is_shown_with_its_note_and_without_figures_that_it_lacks():
    note = "pass fuse is gone: TILEWRIGHT_PASS_LIMIT=13 stops before it"
    found = comparison(
        row(subject="decode step", series="launches"),
        changed("program", note),
        changed("gated", "gone: gated_ea91-fa314f13"),
        changed("paged_attention", "launches changed", target="a100"),
        row(Verdict.IMPROVEMENT, subject="spills", new=8, note="well done"),
    )
    rendered, output = render_markdown(found), printed(found)
    shown = rendered.replace("&#95;", "_")
    assert f"- <code>program</code> source (llama-1b on h100): {note}" in shown
    assert "40 → 8, 0.200×; well done" in shown
    # Where there are findings, what differs is said before them, the pass before the kernels.
    begins = shown.index(f"- llama-1b on h100: {note}; kernels: gated")
    assert begins < shown.index("#### Regressions") and "a100: kernels" not in shown
    assert "TILEWRIGHT_PASS_LIMIT=13 stops" in " ".join(output.split())
    for report in (rendered, output, render_junit(found)):
        assert "none → none" not in report
    assert causes(comparison(*found.rows[1:])) == []


@pytest.mark.quick
def test_one_kernel_does_not_fill_the_tables_but_the_other_reports_have_it_all():
    many = [row(subject="attention", series=f"s{i}") for i in range(19)]
    found = comparison(row(subject="program", series="KV bytes a token"), *many, row(subject="add"))
    table, *_ = tables(render_markdown(found))
    assert [cells[0] for cells in table[1:]] == [
        f"<code>{name}</code>" for name in ("program", *["attention"] * (OF_ONE + 1), "add")
    ]
    assert table[-2][3] == f"and {19 - OF_ONE} more of it"
    assert f"and {19 - OF_ONE} more of it" in printed(found)
    assert len(ET.fromstring(render_junit(found)).findall(".//failure")) == 21
    assert len(comparison_data(found)["rows"]) == 21
    wins = comparison(*(replace(one, verdict=Verdict.IMPROVEMENT) for one in many))
    assert f"(llama-1b on h100): and {19 - OF_ONE} more of it" in render_markdown(wins)


@pytest.mark.quick
def test_rows_that_are_the_same_on_several_targets_are_shown_once():
    places = ("h100", "a100", "l4")
    found = comparison(
        *(row(subject="decode step", target=place, series="launches") for place in places),
        *(row(subject="attention", target=place, new=48 + i) for i, place in enumerate(places)),
        *(changed("program", "pass fuse is gone", target=place) for place in places),
    )
    table, *_ = tables(render_markdown(found))
    assert [cells[2] for cells in table[1:]] == ["h100, a100, l4", *places]
    assert "program</code> source (llama-1b on h100, a100, l4): pass" in render_markdown(found)
    assert "llama-1b on h100, a100, l4" in printed(found)


def test_what_compares_nothing_has_not_passed():
    assert render_markdown(comparison()).startswith("**Nothing compared**: ")
    assert "nothing compared: " in printed(comparison())


# JUnit


@given(comparisons)
def test_junit_parses_and_counts_what_the_comparison_counts(found):
    root = ET.fromstring(render_junit(found).encode("utf-8"))
    suites = root.findall("testsuite")
    assert len(suites) == len({(r.tier, r.case, r.target) for r in found.rows})
    cases = root.findall("testsuite/testcase")
    findings = found.findings
    skipped = 0 if found.strict else len(found.of(Verdict.UNDECIDABLE))
    for element, every in ((root, [root]), (None, suites)):
        for name, want in (("tests", len(cases)), ("failures", len(findings))):
            assert sum(int(e.get(name)) for e in every) == want, element
        assert sum(int(e.get("skipped")) for e in every) == skipped
    assert len(cases) == len(found.rows)
    assert len(root.findall(".//failure")) == len(findings)
    assert len(root.findall(".//skipped")) == skipped


@pytest.mark.quick
def test_junit_names_the_kernel_and_shows_its_diff():
    found = comparison(
        row(tier=1, series="source", better="equal", note="first\x00note"),
        row(Verdict.UNDECIDABLE, series="time"),
        row(Verdict.IMPROVEMENT, series="spills", note="well done"),
        diffs=(Diff("llama-1b", "h100", "rms_norm_bf16", "changed", "-a\n+b]]>"),),
    )
    root = ET.fromstring(render_junit(found))
    first = root.find("testsuite[1]/testcase")
    assert first.get("classname") == "llama-1b.h100.rms_norm_bf16" and first.get("name") == "source"
    failure = first.find("failure")
    assert failure.get("type") == "regression"
    assert failure.get("message") == "rms_norm_bf16 source: regression, 40 → 48"
    assert "-a\n+b]]>" in failure.text and "note: firstnote" in failure.text
    assert root.find("testsuite[2]/testcase/skipped") is not None
    assert "well done" in root.find("testsuite[2]/testcase[2]/system-out").text
    versions = {p.get("name"): p.get("value") for p in root.findall("testsuite[1]/properties/*")}
    assert versions["old.version.triton"] == "3.6" and versions["new.version.triton"] == "3.7"


def test_junit_fails_what_is_not_decidable_when_it_is_strict():
    root = ET.fromstring(render_junit(comparison(row(Verdict.UNDECIDABLE), strict=True)))
    assert root.get("failures") == "1" and root.get("skipped") == "0"
    assert root.find(".//failure").get("type") == "not decidable"


# The page


def island(page: str) -> dict:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert len(found) == 1
    return json.loads(found[0])


@given(comparisons, st.lists(plots, max_size=3), text)
def test_the_page_holds_its_data_and_no_markup_of_theirs(found, histories, title):
    page = render_page(found, histories, title)
    data = island(page)
    assert read_comparison(data["comparison"]) == found
    assert [p["name"] for p in data["plots"]] == [p.name for p in histories]
    assert len(data["shown"]) == len(found.rows) and data["title"] == title
    assert Markup(page).tags == Markup(render_page(comparison(), [], "x")).tags
    page.encode("utf-8")


@pytest.mark.quick
def test_the_page_fetches_nothing_and_runs_its_own_script_only():
    page = render_page(comparison(row()), [], "nightly")
    assert Markup(page).fetches == []
    for word in ("http://", "https://", "url(", "@import", "@@", "innerHTML", "insertAdjacent"):
        assert word not in page, word
    assert "default-src 'none'" in page
    digest = re.search(r"script-src 'sha256-([^']+)'", page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    assert base64.b64decode(digest) == hashlib.sha256(script.encode()).digest()


def test_a_page_may_hold_histories_alone():
    points = tuple(Point(f"2026-01-{i + 1:02}", "abc", 1.0 + i, None, None) for i in range(9))
    steps = (ChangePoint(3, 1.0, math.inf),)
    plot = SeriesPlot("n", "c", "t", "k", "time", "s", "lower", points, steps, pinned=math.nan)
    data = island(render_page(None, [plot], "history"))
    assert data["comparison"] is None and "shown" not in data
    assert data["plots"][0]["points"][0] == ["2026-01-01", "abc", 1.0, None, None]
    assert data["plots"][0]["change_points"] == [[3, 1.0, None]]
    assert data["plots"][0]["pinned"] is None


def test_the_band_of_a_gate_is_read_from_its_words():
    measured = Interval(1.0, 0.99, 1.01)
    assert gate_band(row(gate="+5%", ratio=measured)) == (0.95, 1.05)
    assert gate_band(row(gate="2.5%", ratio=measured)) == pytest.approx((0.975, 1.025))
    assert gate_band(row(gate="+0", ratio=measured)) is None
    assert gate_band(row(gate="5%")) is None


# The terminal


def printed(found: Comparison) -> str:
    stream = io.StringIO()
    print_comparison(found, Console(file=stream, width=160, highlight=False))
    return stream.getvalue()


@given(comparisons)
def test_the_terminal_gets_no_control_characters_and_the_summary_last(found):
    output = printed(found)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", re.sub("\t", " ", output))
    outcome = "failed" if found.exit_code else "passed" if found.rows else "nothing compared"
    assert " ".join(output.split()).endswith(f"{outcome}: {headline(found)}")


def test_the_terminal_shows_findings_before_wins_and_cuts_diffs():
    diffs = tuple(Diff("c", "t", f"k{i}", "changed", "+x\n" * 100) for i in range(9))
    output = printed(
        comparison(
            row(Verdict.IMPROVEMENT, subject="faster"), row(subject="slower[red]"), diffs=diffs
        )
    )
    assert output.index("slower[red]") < output.index("faster")
    assert "more lines" in output and output.count("+x") == SHOWN_DIFFS * SHOWN_LINES
    many = printed(comparison(*[row(subject=f"s{i}") for i in range(60)], diffs=diffs))
    assert "and 20 more" in many and "and 3 more diffs" in many
