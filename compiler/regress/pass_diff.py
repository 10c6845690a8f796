"""The first pass after which two runs of the pipeline differ."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

Passes = Sequence[tuple[str, str]]
"""(pass, hash of the graph after it) in order; the captured graph is first."""


def first_changed_pass(old: Passes, new: Passes) -> tuple[str | None, int | None, str] | None:
    """The first pass after which the graphs differ; None where they never do.

    Passes are aligned by their names; one that came, went or moved is blamed only if it changes
    the graph.

    Returns:
        The pass (None: the captured graph), the number of passes of ``new`` that run before it,
        and what happened to it, in words.
    """
    if old[:1] != new[:1]:
        return None, None, "the captured graph differs, before any pass"
    names = [name for name, _ in old], [name for name, _ in new]
    for tag, a, a_end, b, b_end in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag == "equal":
            for shift in range(b_end - b):
                if old[a + shift][1] != new[b + shift][1]:
                    return new[b + shift][0], b + shift - 1, "makes another graph"
        elif old[a_end - 1][1] != new[b_end - 1][1]:
            return _came_or_went(old, new, (a, a_end), (b, b_end))
    return None


def first_pass(old: Passes, new: Passes) -> str:
    """The same in words, with the limit that stops before the pass; empty where none differs."""
    found = first_changed_pass(old, new)
    if found is None:
        return ""
    name, limit, what = found
    return what if name is None else f"pass {name} {what}: {stops_before(limit)}"


def stops_before(limit: int | None) -> str:
    """The setting that runs the passes before the one to blame only."""
    return f"TILEWRIGHT_PASS_LIMIT={limit} stops before it"


def _came_or_went(
    old: Passes, new: Passes, gone: tuple[int, int], came: tuple[int, int]
) -> tuple[str, int, str]:
    """The pass to blame where other passes run, and what they make differs.

    Both sides enter with the same graph, so a side without a pass that changes it leaves with
    that graph, and the other side must have one.
    """
    was, there = ({name for name, _ in side} for side in (old, new))
    for index in range(*came):
        name, hash = new[index]
        if hash != new[index - 1][1]:
            what = "runs elsewhere now, or more often" if name in was else "is new"
            return name, index - 1, what
    name = next(old[i][0] for i in range(*gone) if old[i][1] != old[i - 1][1])
    what = "runs elsewhere now, or less often" if name in there else "is gone"
    return name, came[0] - 1, what
