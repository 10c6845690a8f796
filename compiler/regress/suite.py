"""The suite file: which models and kernels are watched, by whom, and how far they may move."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ...codegen.triton.aot import ARCHS
from ...errors import GraphError, UsageError
from ...ir.parser import parse_graph
from ...targets import TARGETS
from ..options import DTYPES
from .gates import GATE_FORMS, Gate, rule_of
from .model import Better

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_HEAD = 16 << 20  # bytes of a GGUF file that tell it apart, with its size
GPU_TARGETS = tuple(name for name, target in TARGETS.items() if target.arch in ARCHS)
_COMMON = ("name", "targets", "owner", "watch")
_MODEL_KEYS = (
    *_COMMON,
    "config",
    "path",
    "dtype",
    "max_model_len",
    "max_batch_size",
    "page_size",
    "timed",
)
TIMED = ("kernels", "phases")
_GRAPH_KEYS = (*_COMMON, "text", "sizes")
_HOST_KEYS = ("name", "owner")
_HOST_WORK = 1  # counts up when what host.py does is other work
_SUITE_KEYS = ("name", "owner", "thresholds", "model", "graph", "host")


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A causal LM, compiled as `tilewright.compile` does.

    Attributes:
        name: of the case.
        targets: devices to compile for.
        owner: who is asked about it.
        watch: kernels that must exist, by their names without hashes.
        config: of transformers; None where a path is given.
        path: a Hugging Face folder, of which only config.json is read, or a GGUF file.
        dtype, max_model_len, max_batch_size, page_size: as `tilewright.compile` takes them.
        timed: what tier 3 measures of it, of ``TIMED``.
    """

    name: str
    targets: tuple[str, ...]
    owner: str
    watch: tuple[str, ...]
    config: Mapping[str, Any] | None
    path: Path | None
    dtype: str
    max_model_len: int | None
    max_batch_size: int
    page_size: int
    timed: tuple[str, ...] = ()

    @property
    def definition(self) -> str:
        """A hash of what decides the case's snapshots, however it is written."""
        return _hash(
            [
                "model",
                self.config if self.path is None else _content(self.path),
                self.dtype,
                self.max_model_len,
                self.max_batch_size,
                self.page_size,
            ]
        )


@dataclass(frozen=True, slots=True)
class GraphCase:
    """A graph in the IR's text form, lowered as it stands: an isolated kernel.

    Attributes:
        name, targets, owner, watch: as of a model.
        text: of the graph.
        sizes: of its symbols, where costs are evaluated.
    """

    name: str
    targets: tuple[str, ...]
    owner: str
    watch: tuple[str, ...]
    text: str
    sizes: Mapping[str, int]

    @property
    def definition(self) -> str:
        """A hash of what decides the case's snapshots."""
        return _hash(["graph", self.text, dict(self.sizes)])


@dataclass(frozen=True, slots=True)
class HostCase:
    """What Python does in a step, counted on a CPU (host.py).

    Attributes:
        name, targets, owner, watch: as of a model; the only target is "cpu".
    """

    name: str
    owner: str
    targets: tuple[str, ...] = ("cpu",)
    watch: tuple[str, ...] = ()

    @property
    def definition(self) -> str:
        """A hash of what decides the case's snapshots."""
        return _hash(["host", _HOST_WORK])


Case: TypeAlias = ModelCase | GraphCase | HostCase


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite file, checked.

    Attributes:
        name, owner: of the suite.
        cases: models, then graphs, then the host's, in the file's order.
        thresholds: (glob over "subject/series", gate); later ones win.
        path: of the file.
        digest: sha256 of the file.
    """

    name: str
    owner: str
    cases: tuple[Case, ...]
    thresholds: tuple[tuple[str, Gate], ...] = ()
    path: Path = field(default_factory=Path)
    digest: str = ""

    def rule(self, subject: str, series: str) -> tuple[Better, Gate]:
        """Which way is good for a series, and how far it may move the other way."""
        return rule_of(subject, series, self.thresholds)

    def chosen(self, only: Sequence[str] | None) -> tuple[Case, ...]:
        """The cases of these names, or all.

        Raises:
            UsageError: a name that the suite lacks; the message lists those that it has.
        """
        names = [case.name for case in self.cases]
        for name in only or ():
            if name not in names:
                raise UsageError(
                    f"case {name!r}",
                    expected=f"one of {', '.join(names)}",
                    found="no case of that name in the suite",
                    remedy="Choose one of those.",
                )
        return tuple(case for case in self.cases if only is None or case.name in only)


def load_suite(path: str | Path) -> Suite:
    """Reads a suite file.

    Raises:
        UsageError: the file, the table and the key that are wrong, and what is valid there.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        data = tomllib.loads(content.decode())
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(
            f"suite file {path}",
            expected="a TOML file",
            found=str(error),
            remedy="Correct it, or name another file.",
        ) from error
    table = _Table(data, str(path), _SUITE_KEYS)
    owner = table.text("owner", "")
    cases: list[Case] = [
        *(_model(one, owner, path.parent) for one in table.tables("model", _MODEL_KEYS)),
        *(_graph(one, owner) for one in table.tables("graph", _GRAPH_KEYS)),
        *(_host(one, owner) for one in table.tables("host", _HOST_KEYS)),
    ]
    if not cases:
        raise table.wrong("model", "at least one [[model]], [[graph]] or [[host]]", "none")
    _refuse_twins(table, cases)
    thresholds = tuple(_threshold(table, *pair) for pair in table.mapping("thresholds").items())
    digest = hashlib.sha256(content).hexdigest()
    return Suite(table.text("name"), owner, tuple(cases), thresholds, path, digest)


class _Table:
    """A table of the file, and how to complain about it."""

    def __init__(self, data: Any, where: str, valid: Sequence[str]) -> None:
        self.where = where
        if not isinstance(data, dict):
            raise self.wrong("", "a table", repr(data))
        self.data = data
        for key in data:
            if key not in valid:
                raise self.wrong(key, f"one of the keys {', '.join(valid)}", f"the key {key!r}")

    def wrong(self, key: str, expected: str, found: str) -> UsageError:
        culprit = f"{self.where}, key {key!r}" if key else self.where
        return UsageError(culprit, expected=expected, found=found, remedy="Correct the suite file.")

    def get(self, key: str, type_: type, words: str, default: Any = None) -> Any:
        value = self.data.get(key, default)
        if type(value) is not type_:
            missing = key not in self.data
            raise self.wrong(key, words, "no such key" if missing else repr(value))
        return value

    def text(self, key: str, default: str | None = None) -> str:
        found = self.get(key, str, "text", default)
        assert isinstance(found, str)
        return found

    def count(self, key: str, default: int) -> int:
        found = self.get(key, int, "an integer of 1 or more", default)
        if found < 1:
            raise self.wrong(key, "an integer of 1 or more", repr(found))
        return int(found)

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        found = self.get(key, list, "a list of texts", default)
        if not all(isinstance(item, str) for item in found):
            raise self.wrong(key, "a list of texts", repr(found))
        return tuple(found)

    def one_of(self, key: str, value: str, valid: Sequence[str]) -> str:
        if value not in valid:
            raise self.wrong(key, f"one of {', '.join(valid)}", repr(value))
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        found = self.get(key, dict, "a table", {})
        assert isinstance(found, dict)
        return found

    def tables(self, key: str, valid: Sequence[str]) -> list[_Table]:
        found = []
        for index, data in enumerate(self.get(key, list, f"tables [[{key}]]", [])):
            name = data.get("name") if isinstance(data, dict) else None
            found.append(_Table(data, f"{self.where}, [[{key}]] {name or index + 1}", valid))
        return found


def _case_name(table: _Table) -> str:
    name = table.text("name")
    if not _NAME.fullmatch(name):  # it names files, and the model in graph texts
        raise table.wrong("name", "letters, digits, - and _", repr(name))
    return name


def _common(table: _Table, owner: str) -> tuple[str, tuple[str, ...], str, tuple[str, ...]]:
    name = _case_name(table)
    targets = table.texts("targets")
    for target in targets:
        table.one_of("targets", target, GPU_TARGETS)
    if not targets or len(set(targets)) < len(targets):
        raise table.wrong("targets", "at least one target, each once", repr(list(targets)))
    return name, targets, table.text("owner", owner), table.texts("watch", [])


def _model(table: _Table, owner: str, folder: Path) -> ModelCase:
    name, targets, owner, watch = _common(table, owner)
    given = [key for key in ("config", "path") if key in table.data]
    if len(given) != 1:
        raise table.wrong("config", "either config or path", " and ".join(given) or "neither")
    config, path = None, None
    if given == ["config"]:
        config = _config(table, folder)
    else:
        path = folder / table.text("path")
        if not (path.is_file() or (path / "config.json").is_file()):
            raise table.wrong("path", "a folder with config.json, or a .gguf file", str(path))
    longest = table.count("max_model_len", 1) if "max_model_len" in table.data else None
    return ModelCase(
        name,
        targets,
        owner,
        watch,
        config,
        path,
        table.one_of("dtype", table.text("dtype", "bfloat16"), tuple(DTYPES)),
        longest,
        table.count("max_batch_size", 32),
        table.count("page_size", 16),
        tuple(table.one_of("timed", what, TIMED) for what in table.texts("timed", [])),
    )


def _config(table: _Table, folder: Path) -> Mapping[str, Any]:
    config = table.data["config"]
    if isinstance(config, str):
        path = folder / config
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise table.wrong("config", "a config.json of transformers", f"{path}: {error}") from (
                error
            )
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise table.wrong(
            "config", "a file name, or a table with model_type and more", repr(config)[:200]
        )
    return config


def _graph(table: _Table, owner: str) -> GraphCase:
    name, targets, owner, watch = _common(table, owner)
    text = table.text("text")
    try:
        symbols = parse_graph(text).symbols
    except GraphError as error:
        raise table.wrong("text", error.expected, f"{error.culprit}: {error.found}") from error
    sizes = table.mapping("sizes")
    if set(sizes) != set(symbols) or not all(type(n) is int and n > 0 for n in sizes.values()):
        wanted = ", ".join(symbols) or "nothing"
        raise table.wrong("sizes", f"an integer of 1 or more for {wanted}", repr(sizes))
    return GraphCase(name, targets, owner, watch, text, sizes)


def _host(table: _Table, owner: str) -> HostCase:
    return HostCase(_case_name(table), table.text("owner", owner))


def _threshold(table: _Table, glob: str, value: object) -> tuple[str, Gate]:
    try:
        if isinstance(value, str):
            return glob, Gate.parse(value)
    except ValueError:
        pass
    where = f"{table.where}, [thresholds], key {glob!r}"
    raise UsageError(
        where, expected=GATE_FORMS, found=repr(value), remedy="Correct the suite file."
    )


def _refuse_twins(table: _Table, cases: Sequence[Case]) -> None:
    seen: set[str] = set()
    for case in cases:
        if case.name.lower() in seen:  # they name files, which some systems fold
            raise table.wrong("name", "a name of its own for each case", f"{case.name!r} twice")
        seen.add(case.name.lower())


def _content(path: Path) -> str:
    """What tells a model file from another: a folder's config, a GGUF file's head and size."""
    if path.is_dir():
        return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    with path.open("rb") as file:
        return f"{hashlib.sha256(file.read(_HEAD)).hexdigest()}:{path.stat().st_size}"


def _hash(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
