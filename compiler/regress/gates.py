"""How far each series may move before it is a finding, and which way is the good one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...autotune.verdicts import Verdict
from .model import Better

_GATE = re.compile(r"\+?(\d+(?:\.\d+)?)\s*(%?)")
_PART = re.compile(r" \(([^()]*)\)$")  # the binary that a series is of: "registers (merge)"
GATE_FORMS = '"5%", "2" (so many more or fewer), "0", or "any"'
_ROUNDING = 1e-9  # sums of floats differ by this share when their order does


@dataclass(frozen=True, slots=True)
class Gate:
    """How much worse a value may be.

    Attributes:
        allowed: a share of the old value, or an amount; infinite for "any".
        relative: whether it is a share.
    """

    allowed: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Reads ``GATE_FORMS``; ValueError for anything else."""
        if text == "any":
            return cls(math.inf, False)
        found = _GATE.fullmatch(text.strip())
        if found is None:
            raise ValueError(text)
        number, percent = found.groups()
        return cls(float(number) / 100 if percent else float(number), bool(percent))

    def passes(self, old: float, worsening: float) -> bool:
        """Whether a value may get worse by so much, or better by so much unnoticed."""
        limit = self.allowed * abs(old) if self.relative else self.allowed
        return worsening <= limit + _ROUNDING * abs(old)

    def words(self, better: Better) -> str:
        """As rows show it: "+5%", or "-0" for what may not fall."""
        if math.isinf(self.allowed):
            return "any"
        sign = {"lower": "+", "higher": "-", "equal": "±"}[better]
        return f"{sign}{self.allowed * 100:g}%" if self.relative else f"{sign}{self.allowed:g}"


DEFAULTS: tuple[tuple[str, Better, str], ...] = (
    # Anything unknown: shown when it differs, and blamed on nobody.
    ("*", "equal", "any"),
    # What a thread and a block take.
    ("*/registers", "lower", "10%"),
    ("*/spills", "lower", "0"),
    ("*/local bytes", "lower", "0"),
    ("*/shared", "lower", "0"),
    ("*/scratch", "lower", "0"),
    ("*/threads", "equal", "0"),
    ("*/programs", "equal", "0"),
    ("*/warps per SM", "higher", "0"),
    ("*/pdl", "higher", "0"),
    # What the machine code consists of. Loads that are narrow are loads that lost their width.
    ("*/instructions", "lower", "5%"),
    ("*/loop instructions", "lower", "2%"),
    ("*/bits per global load", "higher", "10%"),
    ("*/bits per global store", "higher", "10%"),
    ("*/global loads *", "lower", "10%"),
    ("*/global stores *", "lower", "10%"),
    *(
        (f"*/global {what} {bits}-bit", "lower", "0")
        for what in ("loads", "stores")
        for bits in (8, 16, 32)
    ),
    *((f"*/async copies {bits}-bit", "lower", "0") for bits in (8, 16, 32)),
    ("*/shared loads *", "lower", "10%"),
    ("*/shared stores *", "lower", "10%"),
    ("*/local loads", "lower", "0"),
    ("*/local stores", "lower", "0"),
    ("*/atomics", "lower", "0"),
    ("*/barriers", "lower", "10%"),
    ("*/MUFU", "lower", "10%"),
    ("*/async loads", "higher", "0"),
    ("*/tensor cores", "higher", "0"),
    # What a step comes to.
    ("*/launches", "lower", "0"),
    ("*/launches a layer", "lower", "0"),
    ("*/pdl launches", "higher", "0"),
    ("*/flops", "lower", "0"),
    ("*/bytes", "lower", "0"),
    ("*/roofline", "lower", "0"),
    ("*/peak memory", "lower", "0"),
    ("*/workspace", "lower", "0"),
    ("*/resident peak", "lower", "0"),
    ("*/graph obstacles", "lower", "0"),
    ("program/weight bytes", "lower", "0"),
    ("program/KV bytes a token", "lower", "0"),
    ("program/kernels", "lower", "0"),
    ("program/binaries", "lower", "0"),
    ("program/code bytes", "lower", "5%"),
    *(
        (f"{program}/{kind} calls", "lower", "0")
        for program in ("program", "decode program")
        for kind in ("aten", "eager")
    ),
    # What compiling takes.
    ("compile/python calls*", "lower", "1%"),
    # What the host does in a step.
    ("host/python calls*", "lower", "2%"),
    ("host/C calls*", "lower", "0"),
    ("host/graph replays", "higher", "0"),
    ("host/buckets", "lower", "0"),
    ("host/padded rows", "lower", "0"),
    # What is measured (tier 3).
    ("*/time", "lower", "3%"),
    ("*/itl", "lower", "5%"),
    ("*/ttft", "lower", "8%"),
    ("*/throughput", "higher", "15%"),
)
"""(glob over "subject/series", good direction, gate); later lines win, then a suite's own."""

UNITS = {
    "bytes": "bytes",
    "spills": "bytes",
    "local bytes": "bytes",
    "shared": "bytes",
    "scratch": "bytes",
    "peak memory": "bytes",
    "workspace": "bytes",
    "resident peak": "bytes",
    "code bytes": "bytes",
    "weight bytes": "bytes",
    "KV bytes a token": "bytes",
    "roofline": "s",
    "bits per global load": "bits",
    "bits per global store": "bits",
}
"""Of the series that are no plain counts."""


def bare(series: str) -> str:
    """A series without the binary that it is of: "registers (merge)" → "registers"."""
    return _PART.sub("", series)


def part_of(series: str) -> str:
    """The binary that a series is of: "registers (merge)" → "merge"; empty where there is one."""
    found = _PART.search(series)
    return found[1] if found else ""


def rule_of(subject: str, series: str, own: Iterable[tuple[str, Gate]] = ()) -> tuple[Better, Gate]:
    """Which way is good for a series, and its gate.

    Args:
        subject, series: as rows name them.
        own: a suite's thresholds, in order.
    """
    names = (f"{subject}/{series}", f"{subject}/{bare(series)}")

    def fits(glob: str) -> bool:
        return any(fnmatchcase(name, glob) for name in names)

    better, text = [(better, text) for glob, better, text in DEFAULTS if fits(glob)][-1]
    gates = [Gate.parse(text), *(gate for glob, gate in own if fits(glob))]
    return better, gates[-1]


def judge(old: float, new: float, better: Better, gate: Gate) -> Verdict:
    """What a change of a deterministic series is: beyond its gate in either direction, or not."""
    if math.isclose(old, new, rel_tol=_ROUNDING):
        return Verdict.NO_CHANGE
    if better == "equal":
        if math.isinf(gate.allowed):
            return Verdict.CHANGED
        return Verdict.NO_CHANGE if gate.passes(old, abs(new - old)) else Verdict.REGRESSION
    worsening = new - old if better == "lower" else old - new
    if gate.passes(old, abs(worsening)):
        return Verdict.NO_CHANGE
    if math.isinf(gate.allowed):
        return Verdict.CHANGED
    return Verdict.REGRESSION if worsening > 0 else Verdict.IMPROVEMENT
