"""Collects snapshots: compiles each case for each target, without a GPU; what was collected before
from the same sources is taken from the cache, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from ...codegen.triton.lowering import lower_graph
from ...codegen.triton.workers import kept_workers
from ...errors import TilewrightError
from ...formats.atomic import write_atomic
from ...ir.graph import Graph
from ...ir.parser import parse_graph
from ...runtime.image import EngineImage
from ...settings import current
from ...targets import Target
from ..api import Phases, Progress, compile_image
from ..bench.machine import package_versions
from ..options import KVCacheConfig, resolve_options
from .checkout import Checkout
from .counting import PYTHON, CountedPhases, Counts, count_calls
from .facts import snapshot_of
from .host import host_series, unlaunched_runners
from .model import Side
from .snapshot import Snapshot
from .suite import Case, GraphCase, HostCase, ModelCase, Suite

Key = tuple[str, str]
"""Names of a case and a target."""

DECISIVE = ("triton", "torch", "transformers")
"""Packages without whose equal versions nothing can be compared."""


def collect(
    suite: Suite,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> dict[Key, Snapshot]:
    """A snapshot of each case on each of its targets.

    Args:
        suite: what to collect.
        only: names of cases; None for all.
        progress: called before each with its name and the share that is done.
        fresh: whether to compile anew what the cache has.

    Raises:
        UsageError: a name that the suite lacks.
        TilewrightError: a case that does not compile; the culprit names it.
    """
    wanted = [(case, target) for case in suite.chosen(only) for target in case.targets]
    found: dict[Key, Snapshot] = {}
    warm: set[str] = set()
    with kept_workers():
        for index, (case, target) in enumerate(wanted):
            if progress is not None:
                progress(f"{case.name} on {target}", index / len(wanted))
            path = _cache_path(case, target)
            known = None if fresh else _cached(path)
            if known is None:
                known = _collect_one(case, target, warm=case.name in warm)
                warm.add(case.name)
                _keep(path, known)
            found[case.name, target] = known
    return found


def versions() -> dict[str, str]:
    """Of the packages that decide what is generated, and ours; without local parts, which say how
    they were built.
    """
    names = ("tilewright", *DECISIVE)
    installed = package_versions(names)
    found = {name: _public(installed.get(name, "none")) for name in names}
    return {**found, "python": PYTHON}


def working_tree() -> Side:
    """The sources that this process runs, as a side of a comparison."""
    here = Checkout.running()
    commit = here.commit
    label = "working tree" if commit is None or here.is_dirty else commit[:12]
    return Side(label, commit, datetime.now(UTC).isoformat(timespec="seconds"), None, versions())


def _collect_one(case: Case, target: str, warm: bool) -> Snapshot:
    try:
        if isinstance(case, GraphCase):
            return _of_graph(case, target, warm)
        with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
            if isinstance(case, HostCase):
                return _of_host(case, target, Path(folder))
            return _of_model(case, target, Path(folder), warm)
    except TilewrightError as error:
        raise type(error)(
            f"case {case.name} on {target}: {error.culprit}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


def _of_model(case: ModelCase, target: str, folder: Path, warm: bool) -> Snapshot:
    path = case.path
    if path is None:
        path = folder / case.name  # the folder's name becomes the graph's
        path.mkdir()
        (path / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
    options = resolve_options(
        target=target,
        backend="triton",
        kv_cache=KVCacheConfig("auto", case.page_size),
        dtype=case.dtype,
        max_model_len=case.max_model_len,
        max_batch_size=case.max_batch_size,
        verify="off",
        trust_remote_code=False,
        random_weights=0 if path.is_dir() else None,
        tune="none",  # the same kernels on every machine, whatever its store holds
    )
    options = replace(options, verify="off")  # whatever the environment says: it would be counted
    if not warm:  # what is done once in a process would be counted too
        compile_image(path, None, None, options, Phases())
    phases = CountedPhases()
    image = compile_image(path, None, None, options, phases)
    decode = () if image.decode is None else (image.decode.graphs[-1],)
    generation = _generation([parse_graph(text) for _, text in (image.graphs[-1], *decode)], target)
    counts = {
        "lowering": phases.counts["lower"],
        "passes": phases.counts["passes"],
        "code generation": generation,
    }
    return snapshot_of(image, case.name, case.definition, versions(), counts=counts)


def _of_graph(case: GraphCase, target: str, warm: bool) -> Snapshot:
    from ...codegen.base import get_backend

    graph = parse_graph(case.text)
    if not warm:
        lower_graph(graph, Target.parse(target))
    counts = {"code generation": _generation([graph], target)}
    lowered = get_backend("triton").lower(graph, Target.parse(target))
    image = EngineImage(
        graph.name,
        "module",
        target,
        "triton",
        lowered.program,
        lowered.files,
        {},
        (("captured", str(graph)),),
    )
    return snapshot_of(image, case.name, case.definition, versions(), case.sizes, counts)


def _of_host(case: HostCase, target: str, folder: Path) -> Snapshot:
    series = {"host": host_series(unlaunched_runners(folder))}
    return Snapshot(case.name, target, case.definition, versions(), (), series, {}, (), "", "")


def _generation(graphs: Sequence[Graph], target: str) -> Counts:
    """The work from graphs to the sources of their kernels; compiling those is Triton's."""
    return count_calls(lambda: [lower_graph(graph, Target.parse(target)) for graph in graphs])[1]


def _cache_path(case: Case, target: str) -> Path:
    limit = current().pass_limit
    content = [_sources_hash(), case.name, case.definition, target, versions(), limit]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return current().cache / "regress" / f"{key}.json"


@cache
def _sources_hash() -> str:
    """Of the package as it runs: it does not change under a process."""
    return Checkout.running().digest


def _cached(path: Path) -> Snapshot | None:
    try:
        return Snapshot.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # absent or damaged: collect anew


def _keep(path: Path, snapshot: Snapshot) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(snapshot.to_json()))
    except OSError:  # a cache that cannot be written is no error
        pass


def mismatches(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Decisive packages of which two sides have other versions, in words."""
    pairs = ((name, old.get(name, "none"), new.get(name, "none")) for name in DECISIVE)
    return [f"{name} {a} against {b}" for name, a, b in pairs if _public(a) != _public(b)]


def _public(version: str) -> str:
    """A version without its local part, which says how it was built: "2.13.0+cpu" → "2.13.0"."""
    return version.partition("+")[0]
