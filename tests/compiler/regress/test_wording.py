"""What all reports share: the words and figures, the lines of tables, and the data."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparisons import comparison, comparisons, row
from tilewright.autotune.verdicts import Interval
from tilewright.compiler.regress.data import comparison_data, read_comparison
from tilewright.compiler.regress.model import Diff
from tilewright.compiler.regress.wording import change, kernel_diffs, quantity, ratio, shortened
from tilewright.errors import UsageError

# The words


def test_a_change_that_rounding_would_hide_is_shown_exactly():
    assert change(row(unit="bytes", old=123_456_789, new=123_456_790)) == (
        "123456789 bytes → 123456790 bytes"
    )
    assert change(row(unit="bytes", old=9_216, new=12_582_912)) == "9,216 bytes → 12.58 MB"
    assert change(row(unit="s", old=2.5e-6, new=None)) == "2.5 µs → none"
    assert change(row(old=None, new=None)) == ""


@pytest.mark.parametrize("value", [9_999, 10_000, 38_912, 999_999, 10**6, 1_234_567, 5 * 10**9])
def test_sizes_are_said_in_units_that_give_them_back(value):
    number, unit = quantity(value, "bytes").replace(",", "").split()
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(number) * factor == pytest.approx(value, rel=1e-3)
    assert (unit == "bytes") == (value < 10_000)


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


@given(
    st.lists(st.tuples(st.sampled_from("aab"), st.sampled_from("xy")), max_size=30),
    st.integers(1, 4),
    st.booleans(),
)
def test_rows_that_are_shortened_are_all_counted(names, most, alike):
    rows = [
        row(subject=name, target=target, series="s" if alike else str(i))
        for i, (name, target) in enumerate(names)
    ]
    found = shortened(rows, most)
    assert sum(line.count for line in found) == len(rows)
    assert all(line.more != 1 for line in found)
    shown = [rows.index(line.row) for line in found]
    assert shown == sorted(shown)


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
