"""The reports: whatever names and diffs hold, each parses, and says what the comparison says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
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
from tilewright.compiler.regress.wording import change, headline, kernel_diffs, ratio
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
        len(found.of(verdict))
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
    long = filler * 1_000
    side = Side(long, long, long, long, {f"{i}{long}": long for i in range(50)}, long)
    everything = [
        row(verdict, case=long, target=long, subject=long, series=long, owner=long, note=long)
        for verdict in Verdict
        for _ in range(80)
    ]
    diffs = tuple(Diff(long, long, f"{i}{long}", "changed", long) for i in range(50))
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


# The words


def test_a_change_that_rounding_would_hide_is_shown_exactly():
    assert change(row(unit="bytes", old=123_456_789, new=123_456_790)) == (
        "123456789 bytes → 123456790 bytes"
    )
    assert change(row(unit="bytes", old=9_216, new=12_582_912)) == "9,216 bytes → 12.58 MB"
    assert change(row(unit="s", old=2.5e-6, new=None)) == "2.5 µs → none"


def test_an_open_end_of_an_interval_is_said():
    assert ratio(row(ratio=Interval(1.1, -math.inf, math.inf))) == "1.100× (any to any)"
    assert ratio(row(old=0, new=3)) == "" and ratio(row(old=4, new=4)) == ""


def test_equal_diffs_are_shown_once_and_those_of_findings_first():
    diffs = (
        Diff("a", "h100", "fine", "changed", "+1"),
        Diff("a", "h100", "bad", "changed", "+2"),
        Diff("a", "a100", "bad", "changed", "+2"),
    )
    groups = kernel_diffs(comparison(row(subject="bad"), diffs=diffs))
    assert [(g.index, g.places) for g in groups] == [
        (1, ("a on h100", "a on a100")),
        (0, ("a on h100",)),
    ]


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


# JSON


@pytest.mark.quick
@given(comparisons)
def test_json_reads_back_as_the_same_comparison(found):
    data = json.loads(json.dumps(comparison_data(found), allow_nan=False))
    assert read_comparison(data) == found
    assert data["exit_code"] == found.exit_code


def test_json_says_open_ends_as_null():
    data = comparison_data(comparison(row(ratio=Interval(1.0, -math.inf, math.inf))))
    assert data["rows"][0]["ratio"] == {"value": 1.0, "low": None, "high": None}


WRONG = (
    (("format",), 2, r"comparison\.format: expected 1, found 2"),
    (("kind",), "engine", r"comparison\.kind"),
    (("rows",), {}, r"comparison\.rows: expected a list, found dict"),
    (("rows", 0), 3, r"comparison\.rows\[0\]: expected an object, found int"),
    (("rows", 0, "verdict"), "fine", r"rows\[0\]\.verdict: expected one of regression"),
    (("rows", 0, "verdict"), [], r"rows\[0\]\.verdict"),
    (("rows", 0, "better"), "bigger", r"rows\[0\]\.better"),
    (("rows", 0, "old"), "40", r"rows\[0\]\.old: expected a number, found str"),
    (("rows", 0, "old"), True, r"rows\[0\]\.old: expected a number, found bool"),
    (("rows", 0, "tier"), 1.5, r"rows\[0\]\.tier: expected a whole number"),
    (("rows", 0, "case"), None, r"rows\[0\]\.case: expected a string, found null"),
    (("rows", 0, "ratio"), {"value": 1}, r"rows\[0\]\.ratio\.low: expected a value"),
    (("diffs", 0, "what"), "moved", r"diffs\[0\]\.what"),
    (("old", "versions"), [], r"old\.versions: expected an object"),
    (("old", "versions", "triton"), 3, r"old\.versions\.triton"),
    (("strict",), "no", r"strict: expected true or false"),
)


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_wrong_json_is_refused_by_the_name_of_the_field(path, value, message):
    data = json.loads(
        json.dumps(comparison_data(comparison(row(), diffs=(Diff("c", "t", "k", "gone", ""),))))
    )
    *outer, last = path
    inner = data
    for key in outer:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(UsageError, match=message):
        read_comparison(data)


@pytest.mark.parametrize("field", list(comparison_data(comparison())))
def test_a_field_that_is_gone_is_refused(field):
    data = comparison_data(comparison())
    del data[field]
    if field in ("counts", "exit_code"):  # they follow from the rows
        assert read_comparison(data) == comparison()
        return
    with pytest.raises(UsageError, match=rf"comparison\.{field}: expected a value, found nothing"):
        read_comparison(data)


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_json_that_is_no_object_is_refused(data):
    with pytest.raises(UsageError, match="comparison: expected an object"):
        read_comparison(data)


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
    outcome = "failed" if found.exit_code else "passed"
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
