"""Why a figure of a Program, a phase or compiling moved: which kernels it is in, and whether it is
to the credit or the blame of the code at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ...autotune.verdicts import Verdict
from ...codegen.program import Program
from ...errors import EngineError
from ...ir.graph import Graph
from ...runtime.decode_graphs import obstacles
from ..inspect.kernels import VIEWS, kernel_name
from .gates import UNITS, bare, part_of
from .matching import Pair
from .running import Runs
from .snapshot import PROGRAMS, KernelSnapshot, Number, Snapshot, plain_name
from .wording import between, listed

_LAUNCHES, _FLOPS, _BYTES = range(3)  # columns of `Snapshot.parts`
_PARTS = {
    "launches": _LAUNCHES,
    "launches a layer": _LAUNCHES,
    "pdl launches": _LAUNCHES,
    "flops": _FLOPS,
    "bytes": _BYTES,
}
_MODELLED = frozenset({"flops", "bytes", "roofline", "launches a layer"})
_OF_RUNS = frozenset({"launches", "launches a layer", "workspace", "resident peak"})
_MODEL_CHANGED = "the cost model changed: the Program and all its kernels are the same"
_NOTHING = (0, 0, 0)
Part: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Blame:
    """Two snapshots of a case, for asking what is behind a figure that moved.

    Attributes:
        old, new: the snapshots.
        pairs: the kernels of both.
        runs: binaries of kernels that run in each phase.
    """

    old: Snapshot
    new: Snapshot
    pairs: Sequence[Pair]
    runs: Sequence[Runs]

    @property
    def same_code(self) -> bool:
        """Whether the Program and every kernel are the same."""
        same = all(a is not None and b is not None and a.digest == b.digest for a, b in self.pairs)
        return same and self.old.programs == self.new.programs

    def reconsidered(self, phase: str, series: str, verdict: Verdict) -> tuple[Verdict, str]:
        """The verdict on a figure that moved beyond its gate, and why it is only a change."""
        why = self._neither(phase, series, verdict)
        return (Verdict.CHANGED, why) if why else (verdict, "")

    def culprits(self, subject: str, series: str) -> str:
        """Which kernels, calls or passes have more or less of it, the largest changes first."""
        if subject in PROGRAMS:
            return self._of_program(subject, series)
        if subject == "compile":
            shares = self.old.shares.get(series, {}), self.new.shares.get(series, {})
            return _moved(*shares) if all(shares) else ""
        if series == "graph obstacles":
            sides = (_program(side.program_of(subject)) for side in (self.old, self.new))
            old, new = (Counter(obstacles(one) if one is not None else ()) for one in sides)
            return _moved(old, new)
        if series == "pdl launches":
            return self._parts(subject, series) or self._pdl(subject)
        if series == "roofline":
            return self._first_of(subject, ("bytes", "flops"))
        if series in ("peak memory", "resident peak"):
            return self._memory(subject)
        if series == "workspace":
            return self._kernels_with(lambda kernel: kernel.launches, "launches")
        return self._parts(subject, series) if series in _PARTS else ""

    def weights(self) -> dict[str, float]:
        """How much each kernel weighs: its shares of launches, FLOPs and bytes, over all phases."""
        weights: dict[str, float] = {}
        for side in (0, 1):
            for phase in (self.old, self.new)[side].parts:
                parts = self._sides(phase)[side]
                for column in (_LAUNCHES, _FLOPS, _BYTES):
                    whole = sum(part[column] for part in parts.values()) or 1
                    for subject, part in parts.items():
                        weights[subject] = weights.get(subject, 0.0) + part[column] / whole
        return weights

    def _neither(self, phase: str, series: str, verdict: Verdict) -> str:
        if series in _MODELLED and self.same_code:
            return _MODEL_CHANGED
        if phase in (*PROGRAMS, "compile"):
            return self._left_to_torch() if verdict is Verdict.IMPROVEMENT else ""
        if bare(series) == "programs":
            return self._as_launches(phase, series)
        if series == "pdl launches":
            return self._early_launches(phase, verdict)
        if verdict is Verdict.IMPROVEMENT and series in _OF_RUNS:
            outside = series == "launches a layer" and self._delta(phase, "launches") >= 0
            why = "the step has no fewer: more of them are outside of the layers"
            return self._not_run(phase) or (why if outside else "")
        return ""

    def _delta(self, phase: str, series: str) -> Number:
        new, old = (side.series.get(phase, {}).get(series, 0) for side in (self.new, self.old))
        return new - old

    def _early_launches(self, phase: str, verdict: Verdict) -> str:
        """PDL is lost or won where launches without it are: others may just come and go."""
        early = self._delta(phase, "pdl launches")
        late = self._delta(phase, "launches") - early
        if verdict is Verdict.REGRESSION and late <= 0:
            return "no launch lost it: those that had it are gone"
        if verdict is Verdict.IMPROVEMENT and late >= 0:
            return "no launch won it: there are more"
        return ""

    def _not_run(self, phase: str) -> str:
        """Which binaries run no longer, where launches fell for no other reason."""
        lost = [runs for runs in self.runs if runs.phase == phase and runs.lost]
        old, new = self._sides(phase)
        others = {*old, *new} - {runs.subject for runs in lost}
        delta = sum(new.get(n, _NOTHING)[0] - old.get(n, _NOTHING)[0] for n in others)
        if delta < 0:
            return ""
        return "; ".join(f"{runs.subject}: {runs.note}" for runs in lost)

    def _sides(self, phase: str) -> tuple[Mapping[str, Part], Mapping[str, Part]]:
        """What each kernel has in a phase, old and new, both under the new side's names: one kernel
        more shifts the numbers of others that share its name.
        """
        renamed = {a.subject: b.subject for a, b in self.pairs if a is not None and b is not None}
        taken = set(renamed.values())
        gone = {a.subject for a, b in self.pairs if a is not None and b is None}
        renamed |= {name: f"{name} of before" for name in gone if name in taken}
        old = self.old.parts.get(phase, {})
        return {renamed.get(n, n): p for n, p in old.items()}, self.new.parts.get(phase, {})

    def _parts(self, phase: str, series: str) -> str:
        column = _PARTS[series]
        sides = self._sides(phase)
        old, new = ({name: part[column] for name, part in parts.items()} for parts in sides)
        return _moved(old, new, UNITS.get(series, ""))

    def _first_of(self, phase: str, names: Sequence[str]) -> str:
        found = ((name, self._parts(phase, name)) for name in names)
        return next((f"{name}: {parts}" for name, parts in found if parts), "")

    def _memory(self, phase: str) -> str:
        """Buffers are of calls: those that came, went or grew have theirs otherwise."""
        if self.old.program_of(phase) == self.new.program_of(phase):
            return "the Program is the same: its buffers are planned otherwise"
        old, new = self._sides(phase)
        came, gone = _lacking(new, old), _lacking(old, new)
        return _lists({"new": came, "gone": gone}) or self._first_of(phase, ("bytes", "launches"))

    def _left_to_torch(self) -> str:
        """There is less of ours to compile and to load where torch has taken calls over."""
        more = [
            kind
            for kind in ("aten calls", "eager calls")
            if any(self._delta(program, kind) > 0 for program in PROGRAMS)
        ]
        return f"there are more {' and '.join(more)}: torch makes what was ours" if more else ""

    def _as_launches(self, subject: str, series: str) -> str:
        """Programs come with launches: it is the grid of one that may be wrong."""
        pair = next(p for p in self.pairs if p[1] is not None and p[1].subject == subject)
        launches, programs = [], []
        for side, kernel in zip((self.old, self.new), pair, strict=True):
            parts = side.parts.get(part_of(series), {})
            name = kernel.subject if kernel is not None else ""
            launches.append(parts.get(name, _NOTHING)[_LAUNCHES])
            programs.append(kernel.series.get(series, 0) if kernel is not None else 0)
        if launches[0] == launches[1] or programs[0] * launches[1] != programs[1] * launches[0]:
            return ""
        return f"as its launches: {between(launches[0], launches[1], '')}"

    def _pdl(self, phase: str) -> str:
        """Kernels that run in a phase, and whose launches may start early no longer, or do now."""
        lost: list[str] = []
        won: list[str] = []
        for old, new in self.pairs:
            if old is None or new is None or new.subject not in self.new.parts.get(phase, {}):
                continue
            before, after = (
                sum(n for series, n in kernel.series.items() if bare(series) == "pdl")
                for kernel in (old, new)
            )
            if before != after:
                (lost if after < before else won).append(new.subject)
        return _lists({"lost by": lost, "won by": won})

    def _of_program(self, subject: str, series: str) -> str:
        if series == "kernels":
            return self._kernels_with(lambda kernel: True, "")
        if series in ("binaries", "code bytes"):
            return self._kernels_with(lambda kernel: sorted(kernel.cubins.values()), "machine code")
        kind = series.removesuffix(" calls")
        sides = (side.programs.get(subject, "") for side in (self.old, self.new))
        old, new = (_calls_of_kind(text, kind) for text in sides)
        return _moved(old, new)

    def _kernels_with(self, what: Callable[[KernelSnapshot], object], word: str) -> str:
        """Kernels that came and went, and those of which that differs."""
        came = [new.subject for old, new in self.pairs if old is None and new is not None]
        gone = [old.subject for old, new in self.pairs if new is None and old is not None]
        differ = [new.subject for old, new in self.pairs if old and new and what(old) != what(new)]
        return _lists({"new": came, "gone": gone, f"other {word}": differ})


def _moved(old: Mapping[str, Number], new: Mapping[str, Number], unit: str = "") -> str:
    changes = [(name, old.get(name, 0), new.get(name, 0)) for name in dict.fromkeys((*new, *old))]
    changes = sorted((c for c in changes if c[1] != c[2]), key=lambda c: -abs(c[2] - c[1]))
    return listed([f"{name} {between(a, b, unit)}" for name, a, b in changes])


def _lacking(parts: Mapping[str, Part], others: Mapping[str, Part]) -> list[str]:
    """Kernels that the other side lacks, those that move most bytes first."""
    names = [name for name in parts if name not in others]
    return sorted(names, key=lambda name: -parts[name][_BYTES])


def _lists(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)


def _calls_of_kind(text: str, kind: str) -> Counter[str]:
    """A Program's calls of a kind by what they call, without those that no series counts."""
    counts: Counter[str] = Counter()
    program = _program(text)
    for call in program.calls if program is not None else ():
        if call.kind == kind and not (kind == "eager" and call.kernel.split("/", 1)[1] in VIEWS):
            bodies = [value.name for value in call.attrs.values() if isinstance(value, Graph)]
            counts[" ".join([plain_name(kernel_name(call)), *bodies])] += 1
    return counts


def _program(text: str) -> Program | None:
    """None for one that another version wrote: nobody is named then."""
    try:
        data = json.loads(text)
        return Program.from_json(data) if isinstance(data, dict) else None
    except (ValueError, EngineError):
        return None
