"""The page's part on one launch: whose time is whose, what is drawn, and what is no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.persistent.trace import StepTrace, read_trace
from tilewright.compiler.inspect.timeline import (
    WIDTH,
    draw,
    intervals,
    shares,
    timeline_section,
)
from tilewright.errors import UsageError

FORMS = ("embedding", "8 x 8 <norm>", "attention")
TRACE = StepTrace(
    "tiny",
    FORMS,
    (0, 1, 2),
    (7, 3),
    # met, begun and done of each call: the second program is on the first multiprocessor
    ((0, 0, 100, 100, 150, 400, 400, 400, 400), (0, 0, 0, 10, 110, 500, 510, 600, 1000)),
)


@st.composite
def traces(draw_one: st.DrawFn) -> StepTrace:
    programs, calls = draw_one(st.integers(1, 4)), draw_one(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 10**6), min_size=3 * calls, max_size=3 * calls)
    times = [sorted(draw_one(numbers)) for _ in range(programs)]
    first = min(map(min, times))
    rows = tuple(tuple(time - first for time in row) for row in times)
    places = tuple(draw_one(st.permutations(range(programs))))
    return StepTrace("drawn", FORMS, tuple(i % 3 for i in range(calls)), places, rows)


@given(traces())
@settings(max_examples=15)
def test_all_time_of_a_step_is_named_once(trace: StepTrace) -> None:
    found = list(intervals(trace))
    end = max(map(max, trace.times))
    for line in range(len(trace.places)):
        at = 0
        for one in (one for one in found if one.line == line):
            assert one.start == at and (one.form < 0) == bool(one.reason)
            at = one.stop
        assert at == end
    works, idle = shares(trace, found)
    assert sum(one.share for one in (*works, *idle)) == pytest.approx(1.0 if end else 0.0)
    assert StepTrace.from_json(trace.to_json(), "file") == trace


def test_idle_time_has_the_name_of_what_is_waited_for() -> None:
    works, idle = shares(TRACE, list(intervals(TRACE)))
    assert [(one.name, one.us) for one in works] == [
        ("embedding", pytest.approx(0.05)),
        ("8 x 8 <norm>", pytest.approx(0.32)),
        ("attention", pytest.approx(0.2)),
    ]
    assert {one.name: round(one.us, 6) for one in idle} == {
        "has ended before others": 0.3,
        "waits for embedding": 0.075,
        "waits for 8 x 8 <norm>": 0.045,
        "comes to the next call": 0.01,
    }
    picture = draw(TRACE, list(intervals(TRACE)))
    assert picture.us == 1.0 and picture.height == 10
    # 500 to 510 of 1000 ns, in the line of the lower multiprocessor
    assert f"M{WIDTH * 0.5:.1f} 0h{WIDTH * 0.01:.1f}" in dict(picture.paths)["#c4c0b8"]


def test_the_section_writes_names_as_text() -> None:
    text = timeline_section(TRACE)
    assert "<norm>" not in text and "8 x 8 &lt;norm&gt;" in text
    assert text.count("<svg") == 2 and "2 programs on 2 multiprocessors" in text
    assert timeline_section(None) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "Expecting"),
        ("[]", "something else"),
        (TRACE.to_json().replace("version 1", "version 0"), "something else"),
        (TRACE.to_json().replace('"tiny"', "1"), "names that are missing"),
        (replace(TRACE, calls=(0, 1, 3)).to_json(), "do not fit"),
        (replace(TRACE, places=(1,)).to_json(), "do not fit"),
        (replace(TRACE, times=((1,), (2,))).to_json(), "do not fit"),
        (TRACE.to_json().replace("1000", '"a"'), "do not fit"),
        (None, "No such file"),
    ],
)
def test_what_is_no_trace_is_refused(text: str | None, found: str, tmp_path) -> None:
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=rf"trace .*trace\.json.*{found}"):
        read_trace(path)
