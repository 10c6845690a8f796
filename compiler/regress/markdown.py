"""Markdown for a pull-request comment: findings first, diffs last and cut first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...autotune.verdicts import Verdict
from ...errors import UsageError
from .data import SeriesPlot
from .model import Comparison
from .wording import (
    ACCEPT,
    KernelDiff,
    Line,
    causes,
    change,
    clean,
    cut_bytes,
    headline,
    kernel_diffs,
    one_line,
    outcome,
    places,
    quantity,
    ratio,
    shortened,
    side,
    versions,
)

# GitHub refuses more than 65,536 characters. We count bytes, which are never fewer, and leave
# room for the line by which a workflow finds its comment again.
LIMIT = 65_000
LEAST_LIMIT = 10_000
CELL = 160
NOTE = 240
LABEL = 80
SHORT_LIST = 12
CAUSES = 8
# The most that the last part takes, kept back so that the way to accept is never crowded out,
# and what the lines take that say how much of a section is left out.
TAIL_ROOM = 4_000
REST_ROOM = 1_000
LEAST_DIFF = 400

COLUMNS = (
    "kernel or phase",
    "case",
    "target",
    "what",
    "old → new",
    "ratio (interval)",
    "gate",
    "owner",
    "note",
)
PLOT_COLUMNS = ("kernel or phase", "case", "target", "what", "latest", "changes", "note")

# As entities these are text everywhere: in a cell, in a paragraph, and inside of an HTML element.
ENTITIES = {ord(char): f"&#{ord(char)};" for char in "|`*~[]\\$"}
ENTITIES |= {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
# Underscores within a word are text anyhow, and kernel names are full of them.
EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
# A mention would write to people, a reference would leave a trace in another issue.
MENTION = re.compile(r"@|#(?=\d)|(?<=GH-)(?=\d)", re.IGNORECASE)
NOTHING_WIDE = "&#8203;"


@dataclass(frozen=True, slots=True)
class _Section:
    """A titled list that can be cut: a table where it has a head, else bullets.

    Attributes:
        title: above it.
        lines: of it.
        noun: what a line is of, for saying how many are left out.
        head: of the table.
        most: lines that are shown.
        counts: how many of the noun each line stands for; one each if it is empty.
    """

    title: str
    lines: Sequence[str]
    noun: str
    head: str = ""
    most: int = 10_000
    counts: Sequence[int] = ()

    def fit(self, room: int) -> str:
        """The section in at most ``room`` bytes; what is left out is said."""
        if not self.lines:
            return ""
        start = f"\n#### {self.title}\n\n{self.head}"
        taken: list[str] = []
        used = _size(start) + _size(self._rest(sum(self.counts) or len(self.lines)))
        for line in self.lines[: self.most]:
            used += _size(line) + 1
            if used > room:
                break
            taken.append(f"{line}\n")
        rest = sum(self.counts[len(taken) :]) or len(self.lines) - len(taken)
        body = start + "".join(taken) if taken else ""
        return body + (self._rest(rest) if rest else "")

    def _rest(self, count: int) -> str:
        return f"\n{self.noun} not shown here: {count}; the other reports list them all.\n"


def render_markdown(comparison: Comparison, *, limit: int = LIMIT) -> str:
    """The comparison as a pull-request comment of at most ``limit`` bytes.

    Raises:
        UsageError: a limit that the fixed parts may not fit into.
    """
    text = _head(comparison, limit)
    for section in _sections(comparison):
        text += section.fit(limit - _size(text) - TAIL_ROOM - REST_ROOM)
    tail = _about(comparison)
    text += _diffs(comparison, limit - _size(text) - _size(tail))
    return text + tail


def render_history(plots: Sequence[SeriesPlot], *, title: str, limit: int = LIMIT) -> str:
    """Histories as a comment: the series that got worse first, wins and changes after them.

    Raises:
        UsageError: a limit that the fixed parts may not fit into.
    """
    _check_limit(limit)
    worse = [p for p in plots if p.verdict in (Verdict.REGRESSION, Verdict.MISSING)]
    rest = [p for p in plots if p.change_points and p not in worse]
    text = (
        f"**{'Failed' if worse else 'Passed'}**, {escape(title)}: {len(worse)} of {len(plots)} "
        f"series got worse\n"
    )
    for name, found in (("Worse", worse), ("Other changes", rest)):
        lines = [_table_line(_plot_cells(plot)) for plot in found]
        section = _Section(name, lines, "Series", _table_head(PLOT_COLUMNS))
        text += section.fit(limit - _size(text) - REST_ROOM)
    return text


def escape(text: str, most: int = CELL) -> str:
    """Text on one line that neither Markdown nor HTML reads anything into; mentions notify none."""
    text = EDGE_UNDERSCORE.sub("\0", one_line(text, most).translate(ENTITIES))
    text = MENTION.sub(lambda found: found[0] + NOTHING_WIDE, _keep_entities(text))
    return text.replace("\0", "&#95;").replace("\1", "&#")


def _keep_entities(text: str) -> str:
    # The "#" of an entity is no reference to an issue.
    return text.replace("&#", "\1")


def _head(comparison: Comparison, limit: int) -> str:
    _check_limit(limit)
    names = (comparison.suite, comparison.old.label, comparison.new.label)
    suite, old, new = (_code(name, LABEL) for name in names)
    return (
        f"**{outcome(comparison)}**: {headline(comparison)}\n\n"
        f"Suite {suite}, {old} → {new}, {quantity(comparison.seconds, 's')}\n"
    )


def _check_limit(limit: int) -> None:
    if limit < LEAST_LIMIT:
        raise UsageError(
            "limit",
            expected=f"at least {LEAST_LIMIT} bytes",
            found=str(limit),
            remedy="Give the report more room.",
        )


def _sections(comparison: Comparison) -> Iterable[_Section]:
    def section(
        title: str,
        noun: str,
        verdict: Verdict,
        write: Callable[[Line], str],
        head: str = "",
        most: int = 10_000,
    ) -> _Section:
        found = shortened(comparison.of(verdict))
        counts = [line.count for line in found]
        return _Section(title, list(map(write, found)), noun, head, most, counts)

    def table(title: str, noun: str, verdict: Verdict) -> _Section:
        return section(title, noun, verdict, _row_line, _table_head(COLUMNS))

    def bullets(title: str, noun: str, verdict: Verdict) -> _Section:
        return section(title, noun, verdict, _bullet, most=SHORT_LIST)

    begins = [f"- {escape(place)}: {escape(words, NOTE)}" for words, place in causes(comparison)]
    yield _Section("What is generated otherwise", begins, "Differences", most=CAUSES)
    strict = ", which fails under `--strict`" if comparison.strict else ""
    yield table("Regressions", "Regressions", Verdict.REGRESSION)
    yield table("Missing", "Missing series", Verdict.MISSING)
    yield table(f"Not decidable with this noise{strict}", "Undecided series", Verdict.UNDECIDABLE)
    yield bullets("Improvements", "Improvements", Verdict.IMPROVEMENT)
    yield bullets("Changed", "Changed series", Verdict.CHANGED)


def _row_line(line: Line) -> str:
    row = line.row
    start = [_code(row.subject), escape(row.case), escape(line.target)]
    if line.more:
        return _table_line(_padded([*start, f"and {line.more} more of it"]))
    plain = [row.series, change(row), ratio(row), row.gate, row.owner]
    return _table_line([*start, *map(escape, plain), escape(row.note, NOTE)])


def _padded(cells: Sequence[str]) -> Sequence[str]:
    return [*cells, *[""] * (len(COLUMNS) - len(cells))]


def _plot_cells(plot: SeriesPlot) -> list[str]:
    latest = quantity(plot.points[-1][2], plot.unit) if plot.points else "none"
    changes = "; ".join(
        f"{plot.points[index][0] if index < len(plot.points) else index}: "
        f"{quantity(before, plot.unit)} → {quantity(after, plot.unit)}"
        for index, before, after in plot.change_points
    )
    plain = (plot.case, plot.target, plot.series, latest, changes, plot.note)
    return [_code(plot.subject), *map(escape, plain)]


def _bullet(line: Line) -> str:
    row = line.row
    place = f"({escape(f'{row.case} on {line.target}')})"
    if line.more:
        return f"- {_code(row.subject)} {place}: and {line.more} more of it"
    figures = ", ".join(filter(None, (change(row), ratio(row))))
    said = "; ".join(filter(None, (escape(figures), escape(row.note, NOTE))))
    head = f"- {_code(row.subject)} {escape(row.series)} {place}"
    return f"{head}: {said}" if said else head


def _code(text: str, most: int = CELL) -> str:
    return f"<code>{escape(text, most)}</code>"


def _table_head(columns: Sequence[str]) -> str:
    return f"{_table_line(columns)}\n{_table_line(['---'] * len(columns))}\n"


def _table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _diffs(comparison: Comparison, room: int) -> str:
    groups = kernel_diffs(comparison)
    if not groups:
        return ""
    start = f"\n<details><summary>Diffs of generated code: {len(groups)}</summary>\n"
    end = "\n</details>\n"
    left_out = "\nDiffs left out for want of room: {}; the other reports hold them.\n"
    room -= _size(start) + _size(end) + _size(left_out)
    shown: list[str] = []
    for index, group in enumerate(groups):
        # Short diffs leave their share to the ones that follow.
        share = max(room // (len(groups) - index), LEAST_DIFF)
        block = _diff(group, share)
        if _size(block) > room:
            break
        shown.append(block)
        room -= _size(block)
    # A diff that does not fit even when cut ends the list.
    rest = len(groups) - len(shown)
    return start + "".join(shown) + (left_out.format(rest) if rest else "") + end


def _diff(group: KernelDiff, share: int) -> str:
    text = clean(group.diff.text).strip("\n")
    title = f"{_code(group.diff.subject)} {group.diff.what}: {escape(places(group))}"
    start = f"\n<details><summary>{title}</summary>\n\n"
    end = "\n</details>\n"
    cut_note = "\nCut: {} of {} bytes are shown; the other reports hold the whole diff.\n"
    room = share - _size(start) - _size(end) - _size(cut_note) - 40
    head = cut_bytes(text, max(room, 0))
    # Two fences, each longer than any run of backticks in the text.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", head)), default=0))
    cut = cut_note.format(_size(head), _size(text)) if head != text else ""
    return f"{start}{fence}diff\n{head}\n{fence}\n{cut}{end}"


def _about(comparison: Comparison) -> str:
    lines = [
        f"- old: {escape(side(comparison.old), 200)}",
        f"- new: {escape(side(comparison.new), 200)}",
        "",
        f"If the change is meant, accept it with `{ACCEPT}` and check the new baselines in.",
    ]
    start = "\n<details><summary>Baseline, versions, and how to accept this</summary>\n\n"
    end = "\n</details>\n"
    text = start + "\n".join(lines) + "\n"
    found = versions(comparison)
    table = _Section(
        "Versions",
        [_table_line([escape(part, 60) for part in version]) for version in found],
        "Versions",
        _table_head(("package", "old", "new")),
    )
    return text + table.fit(TAIL_ROOM - _size(text) - _size(end)) + end


def _size(text: str) -> int:
    return len(text.encode("utf-8"))
