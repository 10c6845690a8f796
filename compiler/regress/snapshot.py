"""What tiers 1 and 2 know of one case on one target, as plain data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Number = int | float
_DIGEST = re.compile(r"-[0-9a-f]{8}$")
_BODY_HASH = re.compile(r"_[0-9a-f]{4,}$")
PROGRAM, DECODE_PROGRAM = PROGRAMS = ("program", "decode program")
"""What reports call the Programs."""
DECODE = "decode step"
"""How the phases begin that the decode Program runs."""


@dataclass(frozen=True, slots=True)
class KernelSnapshot:
    """One kernel of a Program.

    Attributes:
        subject: its name in reports: without hashes, numbered where several share it.
        id: name and hash, as Programs call it.
        kind: "generated" or "template".
        digest: of its text, arguments, constants and grids.
        text: its source.
        launches: its variants and their launches, a line each.
        cubins: sha256 of the machine code of each launch, by the launch's label.
        series: figures of tier 2 by name.
    """

    subject: str
    id: str
    kind: str
    digest: str
    text: str
    launches: tuple[str, ...]
    cubins: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecodeSnapshot:
    """The Program that decode steps have for themselves.

    Attributes:
        passes: (pass, sha256 of the graph after it), from where it leaves the general graph.
        graph: text of the last one.
        program: text of the Program.
    """

    passes: tuple[tuple[str, str], ...]
    graph: str
    program: str

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the texts."""
        passes = [list(pair) for pair in self.passes]
        return {"passes": passes, "graph": self.graph, "program": self.program}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DecodeSnapshot:
        """Reads ``to_json`` back."""
        return DecodeSnapshot(_pairs(data["passes"]), str(data["graph"]), str(data["program"]))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A case on a target.

    Attributes:
        case, target: which.
        definition: hash of what the case is.
        versions: of the packages that decide what is generated.
        kernels: in the order of their first calls.
        series: figures of tier 2 of the program, the phases and compiling, by subject and name.
        parts: launches, FLOPs and bytes of each kernel, libraries' too, by phase and subject.
        passes: (pass, sha256 of the graph after it) in order; "captured" is first.
        graph: text of the last graph.
        program: text of the Program.
        running: phase → kernel's subject → labels of the binaries that run in it, in order.
        shares: who has how much of a series of "compile": series → phase or pass → amount.
        decode: the Program of decode steps, None where they have none of their own.
    """

    case: str
    target: str
    definition: str
    versions: Mapping[str, str]
    kernels: tuple[KernelSnapshot, ...]
    series: Mapping[str, Mapping[str, Number]]
    parts: Mapping[str, Mapping[str, tuple[int, int, int]]]
    passes: tuple[tuple[str, str], ...]
    graph: str
    program: str
    running: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    shares: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    decode: DecodeSnapshot | None = None

    @property
    def programs(self) -> dict[str, str]:
        """The texts of the Programs by what reports call them."""
        decode = {} if self.decode is None else {DECODE_PROGRAM: self.decode.program}
        return {PROGRAM: self.program, **decode}

    @property
    def all_passes(self) -> tuple[tuple[str, str], ...]:
        """Those of both graphs, numbered as ``TILEWRIGHT_PASS_LIMIT`` counts them."""
        return self.passes + (() if self.decode is None else self.decode.passes)

    def program_of(self, phase: str) -> str:
        """Text of the Program that runs a phase."""
        if self.decode is not None and phase.startswith(DECODE):
            return self.decode.program
        return self.program

    def facts(self) -> dict[str, Any]:
        """As JSON, but for the long texts, of which it has the hashes."""
        return {
            "case": self.case,
            "target": self.target,
            "definition": self.definition,
            "versions": dict(self.versions),
            "series": {subject: dict(series) for subject, series in self.series.items()},
            "kernels": [
                {
                    "subject": kernel.subject,
                    "id": kernel.id,
                    "kind": kernel.kind,
                    "digest": kernel.digest,
                    "launches": list(kernel.launches),
                    "cubins": dict(kernel.cubins),
                    "series": dict(kernel.series),
                }
                for kernel in self.kernels
            ],
            "parts": {
                phase: {subject: list(part) for subject, part in parts.items()}
                for phase, parts in self.parts.items()
            },
            "running": {
                phase: {subject: list(labels) for subject, labels in subjects.items()}
                for phase, subjects in self.running.items()
            },
            "shares": {series: dict(shares) for series, shares in self.shares.items()},
            "passes": [list(pair) for pair in self.passes],
            "graph": sha256(self.graph),
            "program": sha256(self.program),
            "decode": None
            if (one := self.decode) is None
            else {
                **one.to_json(),
                "graph": sha256(one.graph),
                "program": sha256(one.program),
            },
        }

    def to_json(self) -> dict[str, Any]:
        """As JSON, with all texts."""
        texts = {kernel.id: kernel.text for kernel in self.kernels}
        decode = None if self.decode is None else self.decode.to_json()
        whole = {"graph": self.graph, "program": self.program, "decode": decode}
        return {**self.facts(), "texts": texts, **whole}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Snapshot:
        """Reads ``to_json`` back; KeyError, TypeError or ValueError for anything else."""
        kernels = tuple(
            KernelSnapshot(
                str(kernel["subject"]),
                str(kernel["id"]),
                str(kernel["kind"]),
                str(kernel["digest"]),
                str(data["texts"][kernel["id"]]),
                tuple(map(str, kernel["launches"])),
                {str(label): str(hash) for label, hash in kernel["cubins"].items()},
                _numbers(kernel["series"]),
            )
            for kernel in data["kernels"]
        )
        return Snapshot(
            str(data["case"]),
            str(data["target"]),
            str(data["definition"]),
            {str(name): str(version) for name, version in data["versions"].items()},
            kernels,
            {str(subject): _numbers(series) for subject, series in data["series"].items()},
            {
                str(phase): {str(name): _part(part) for name, part in parts.items()}
                for phase, parts in data["parts"].items()
            },
            _pairs(data["passes"]),
            str(data["graph"]),
            str(data["program"]),
            {
                str(phase): {str(name): tuple(map(str, found)) for name, found in labels.items()}
                for phase, labels in data.get("running", {}).items()  # older ones lack it
            },
            {
                str(series): {str(name): int(share) for name, share in shares.items()}
                for series, shares in data.get("shares", {}).items()
            },
            None if data.get("decode") is None else DecodeSnapshot.from_json(data["decode"]),
        )


def sha256(text: str) -> str:
    """Of a text as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def plain_name(name: str) -> str:
    """A kernel's name without hashes: ``add_rms_norm_29ba-f70e9161`` → ``add_rms_norm``."""
    return _BODY_HASH.sub("", _DIGEST.sub("", name))


def numbered(names: Iterable[str]) -> dict[str, str]:
    """What reports call each kernel: its plain name, with #2, #3 … where it is taken."""
    seen: dict[str, int] = {}
    found = {}
    for name in dict.fromkeys(names):
        plain = plain_name(name)
        count = seen[plain] = seen.get(plain, 0) + 1
        found[name] = plain if count == 1 else f"{plain}#{count}"
    return found


def _pairs(data: Any) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), str(hash)) for name, hash in data)


def _numbers(data: Mapping[str, Any]) -> dict[str, Number]:
    wrong = [name for name, value in data.items() if type(value) not in (int, float)]
    if wrong:
        raise ValueError(f"no number: {wrong[0]}")
    return dict(data)


def _part(data: Any) -> tuple[int, int, int]:
    launches, flops, moved = map(int, data)
    return launches, flops, moved
