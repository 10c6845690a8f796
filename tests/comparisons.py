"""Comparisons and histories for tests of reports: whatever their fields may hold."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.compiler.regress.data import ChangePoint, Point, SeriesPlot
from tilewright.compiler.regress.model import Comparison, Diff, Row, Side

NASTY = (
    "a|b",
    "`x` ``` ````",
    "</script><script>alert(1)</script>",
    "<!-- --> <b>&amp;",
    "@team/kernels #12 GH-3",
    "\x00\x1b[31mred\x07\x9b",
    "line\r\nnext\rlast\n| --- |",
    "🧨 ünï\u2028\u202e",
    "@@DATA@@ @@SCRIPT@@",
    "trailing\\",
    "__init__ *x* [a](b) ~~~ ]]>",
    "\ud800lone",
    "",
)
text = st.one_of(st.sampled_from(NASTY), st.text(max_size=30))
numbers = st.one_of(
    st.none(),
    st.integers(0, 10**7),
    st.floats(allow_nan=False),
    st.floats(1e-7, 1e3),
)
positive = st.floats(0.01, 100)
intervals = st.one_of(
    st.none(),
    st.builds(
        Interval,
        positive,
        st.one_of(positive, st.just(-math.inf)),
        st.one_of(positive, st.just(math.inf)),
    ),
)
rows = st.builds(
    Row,
    tier=st.integers(1, 3),
    case=text,
    target=text,
    subject=text,
    series=text,
    owner=text,
    unit=st.one_of(st.sampled_from(["", "s", "bytes"]), text),
    better=st.sampled_from(["lower", "higher", "equal"]),
    old=numbers,
    new=numbers,
    gate=st.one_of(st.sampled_from(["+0", "+5%", "2%"]), text),
    verdict=st.sampled_from(Verdict),
    ratio=intervals,
    note=text,
)
diffs = st.builds(Diff, text, text, text, st.sampled_from(["changed", "added", "gone"]), text)
sides = st.builds(
    Side,
    text,
    st.none() | text,
    st.none() | text,
    st.none() | text,
    st.dictionaries(text, text, max_size=3),
    st.none() | text,
)
comparisons = st.builds(
    Comparison,
    text,
    sides,
    sides,
    st.lists(rows, max_size=8).map(tuple),
    st.lists(diffs, max_size=4).map(tuple),
    st.floats(0, 1e4),
    st.booleans(),
)
finite = st.floats(allow_nan=False, allow_infinity=False)
plots = st.builds(
    SeriesPlot,
    name=text,
    case=text,
    target=text,
    subject=text,
    series=text,
    unit=text,
    better=st.sampled_from(["lower", "higher", "equal"]),
    points=st.lists(
        st.builds(Point, text, st.none() | text, finite, st.none() | finite, st.none() | finite),
        max_size=4,
    ).map(tuple),
    change_points=st.lists(st.builds(ChangePoint, st.integers(0, 5), finite, finite)).map(tuple),
    pinned=st.none() | finite,
    verdict=st.sampled_from(Verdict),
    note=text,
)


def row(verdict=Verdict.REGRESSION, **values) -> Row:
    usual = {
        "tier": 2,
        "case": "llama-1b",
        "target": "h100",
        "subject": "rms_norm_bf16",
        "series": "registers",
        "owner": "kernels",
        "unit": "",
        "better": "lower",
        "old": 40,
        "new": 48,
        "gate": "+0",
    }
    return Row(**{**usual, **values}, verdict=verdict)


def comparison(*found: Row, diffs: tuple[Diff, ...] = (), **values) -> Comparison:
    old = Side("benchmarks/baselines", "0123456789abcdef", "2026-01-02", "fused", {"triton": "3.6"})
    new = Side("working tree", versions={"triton": "3.7"})
    return Comparison("suite", old, new, found, diffs, **values)
