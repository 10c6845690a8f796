"""JUnit XML: a suite for each tier, case and target, a test case for each row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.etree import ElementTree as ET

from ...autotune.verdicts import Verdict
from .model import Comparison, Diff, Row, Side
from .wording import ACCEPT, change, clean, cut_bytes, headline, ratio

DIFF_BYTES = 20_000


def render_junit(comparison: Comparison) -> str:
    """The comparison as the JUnit XML that CI servers read.

    Findings are failures; what is not decidable is skipped unless the comparison is strict. Notes,
    wins and changes go to the test case's ``system-out``. Characters that XML 1.0 forbids are left
    out.
    """
    findings = frozenset(map(id, comparison.findings))
    root = _element("testsuites", name=comparison.suite, **_totals(comparison.rows, findings))
    root.set("time", _seconds(comparison.seconds))
    suites: dict[tuple[int, str, str], list[Row]] = {}
    for row in comparison.rows:
        suites.setdefault((row.tier, row.case, row.target), []).append(row)
    for (tier, case, target), rows in suites.items():
        name = f"tier {tier}: {case} on {target}"
        suite = _element("testsuite", name=name, **_totals(rows, findings), time="0")
        if comparison.new.recorded:
            suite.set("timestamp", clean(comparison.new.recorded))
        suite.append(_properties(comparison))
        suite.extend(_testcase(row, id(row) in findings, comparison) for row in rows)
        root.append(suite)
    ET.indent(root)
    body = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}\n'


def _totals(rows: Iterable[Row], findings: frozenset[int]) -> dict[str, str]:
    rows = tuple(rows)
    failed = sum(id(row) in findings for row in rows)
    skipped = sum(row.verdict == Verdict.UNDECIDABLE and id(row) not in findings for row in rows)
    counts = {"tests": len(rows), "failures": failed, "errors": 0, "skipped": skipped}
    return {name: str(count) for name, count in counts.items()}


def _seconds(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "0"


def _properties(comparison: Comparison) -> ET.Element:
    properties = _element("properties")
    facts = [("headline", headline(comparison))]
    for which, side in (("old", comparison.old), ("new", comparison.new)):
        facts += [(f"{which}.{name}", value) for name, value in _side_facts(side)]
    properties.extend(_element("property", name=name, value=value) for name, value in facts)
    return properties


def _side_facts(side: Side) -> Iterable[tuple[str, str]]:
    for name in ("label", "commit", "recorded", "reason", "device"):
        value = getattr(side, name)
        if value is not None:
            yield name, value
    for name in sorted(side.versions):
        yield f"version.{name}", side.versions[name]


def _testcase(row: Row, failed: bool, comparison: Comparison) -> ET.Element:
    classname = f"{row.case}.{row.target}.{row.subject}"
    test = _element("testcase", classname=classname, name=row.series, time="0")
    facts = filter(None, (row.verdict.value, change(row)))
    message = f"{row.subject} {row.series}: {', '.join(facts)}"
    if failed:
        failure = _element("failure", message=message, type=row.verdict.value)
        failure.text = clean(_explanation(row, comparison))
        test.append(failure)
    elif row.verdict == Verdict.UNDECIDABLE:
        test.append(_element("skipped", message=f"{message}; {ratio(row)}"))
    elif row.note or row.verdict != Verdict.NO_CHANGE:
        said = _element("system-out")
        said.text = clean(f"{message}\n{row.note}")
        test.append(said)
    return test


def _explanation(row: Row, comparison: Comparison) -> str:
    facts = (
        ("kernel or phase", row.subject),
        ("old → new", change(row)),
        ("ratio", ratio(row)),
        ("gate", row.gate),
        ("owner", row.owner),
        ("note", row.note),
        ("baseline", comparison.old.label),
        ("to accept it", ACCEPT),
    )
    text = "\n".join(f"{name}: {value}" for name, value in facts if value)
    return "\n\n".join([text, *_diffs_of(row, comparison.diffs)])


def _diffs_of(row: Row, diffs: Iterable[Diff]) -> Iterable[str]:
    if row.tier != 1:
        return
    place = (row.case, row.target, row.subject)
    for diff in diffs:
        if (diff.case, diff.target, diff.subject) == place:
            head = cut_bytes(clean(diff.text), DIFF_BYTES)
            yield f"{diff.what}:\n{head}" + ("" if head == clean(diff.text) else "\n… cut")


def _element(tag: str, **attributes: str) -> ET.Element:
    return ET.Element(tag, {name: clean(value) for name, value in attributes.items()})
