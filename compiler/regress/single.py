"""One case of a suite on one target, recorded by the code of any checkout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ...errors import EngineError, UsageError
from .checkout import Checkout
from .model import Row
from .run import baseline_of
from .snapshot import Snapshot
from .suite import Case, GraphCase, HostCase, ModelCase, Suite

_NEAR = 6
_FORM = "CASE.TARGET/SUBJECT/SERIES"


@dataclass(frozen=True, slots=True)
class Watched:
    """A series, and the suite cut down to its case and target.

    Attributes:
        suite: with that case alone.
        series: whole name: "llama.h100/decode step/launches".
        name: of its row: "decode step/launches".
    """

    suite: Suite
    series: str
    name: str

    @staticmethod
    def of(suite: Suite, series: str) -> Watched:
        """A series by its name; UsageError for a case or target that the suite lacks."""
        place, _, name = series.partition("/")
        places = {f"{case.name}.{t}": (case, t) for case in suite.cases for t in case.targets}
        if place not in places:
            raise _unknown(series, place, places, f"the suite {suite.name}")
        if "/" not in name:
            raise UsageError(
                f"series {series!r}",
                expected=f"{_FORM}, as reports name it",
                found="no series of the subject" if name else "a case and a target alone",
                remedy=f"Add what got worse, as in {place}/decode step/launches.",
            )
        case, target = places[place]
        one = replace(suite, cases=(replace(case, targets=(target,)),))
        return Watched(one, series, name)

    @property
    def case(self) -> Case:
        """The case, on the one target."""
        return self.suite.cases[0]

    @property
    def kind(self) -> str:
        """What of the subject it is: "launches"."""
        return self.name.rsplit("/", 1)[1]

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        """Those of the series: one, or several of kernels that share a name."""
        return [row for row in rows if f"{row.subject}/{row.series}" == self.name]

    def unknown(self, rows: Iterable[Row], where: str) -> UsageError:
        """That no row is of the series, and which are alike."""
        names = [f"{row.subject}/{row.series}" for row in rows]
        return _unknown(self.series, self.name, names, where, self.series.removesuffix(self.name))


def _unknown(
    series: str, part: str, names: Iterable[str], where: str, place: str = ""
) -> UsageError:
    there = list(dict.fromkeys(names))
    near = get_close_matches(part, there, n=_NEAR, cutoff=0.4) or sorted(there)[:_NEAR]
    return UsageError(
        f"series {series!r}",
        expected=f"one of {where}, such as {', '.join(place + name for name in near)}",
        found=f"no {part} there",
        remedy=f"Name it as reports do: {_FORM}.",
    )


def record_case(checkout: Checkout, suite: Suite) -> Snapshot:
    """A snapshot of the one case of a suite on its one target, made by a checkout's own code.

    Through the command line, which stays when what is behind it changes from commit to commit.

    Raises:
        EngineError: that code does not compile the case, or writes what we cannot read.
    """
    with tempfile.TemporaryDirectory(prefix="tilewright-") as name:
        folder = Path(name)
        written = replace(suite, path=write_suite(suite, folder))
        try:
            found = baseline_of(checkout, written, None, folder / "baseline")
        except UsageError as error:
            raise EngineError(
                f"the baseline that {checkout.root.name} writes",
                expected=error.expected,
                found=error.found,
                remedy="Choose commits whose baselines this version reads.",
            ) from error
    by = found.side.commit if found is not None else None
    if found is None or by != checkout.commit or len(found.snapshots) != 1:
        raise EngineError(
            f"the code in {checkout.root.name}",
            expected=f"one snapshot, by commit {checkout.commit}",
            found=f"{len(found.snapshots) if found is not None else 0}, by commit {by}",
            remedy="Unset PYTHONPATH and GIT_DIR: they may have run other code.",
        )
    return next(iter(found.snapshots.values()))


def write_suite(suite: Suite, folder: Path) -> Path:
    """Writes a suite file with a suite's cases, and nothing that older code may not know: only what
    is compiled, and where for.
    """
    lines = [f"name = {_toml(suite.name)}"]
    for case in suite.cases:
        if isinstance(case, HostCase):
            lines += ["[[host]]", f"name = {_toml(case.name)}"]
            continue
        lines.append(f"[[{'graph' if isinstance(case, GraphCase) else 'model'}]]")
        lines += [f"name = {_toml(case.name)}", f"targets = {_toml(list(case.targets))}"]
        if isinstance(case, GraphCase):
            sizes = ", ".join(f"{_toml(name)} = {size}" for name, size in case.sizes.items())
            lines += [f"text = {_toml(case.text)}", f"sizes = {{ {sizes} }}"]
        else:
            lines += _model_lines(case, folder)
    path = folder / "suite.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _model_lines(case: ModelCase, folder: Path) -> list[str]:
    if case.path is not None:
        lines = [f"path = {_toml(str(case.path.resolve()))}"]
    else:
        config = f"{case.name}.config.json"
        (folder / config).write_text(json.dumps(case.config), encoding="utf-8")
        lines = [f"config = {_toml(config)}"]
    if case.max_model_len is not None:
        lines.append(f"max_model_len = {case.max_model_len}")
    return [
        *lines,
        f"dtype = {_toml(case.dtype)}",
        f"max_batch_size = {case.max_batch_size}",
        f"page_size = {case.page_size}",
    ]


def _toml(value: str | list[str]) -> str:
    """JSON's texts are TOML's, but for pairs of surrogates and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
