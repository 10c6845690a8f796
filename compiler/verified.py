"""Which numeric checks have passed before: the same code on the same graphs, kernels and weights
gives the same numbers, so that a check need not be made twice.

A result is kept under TILEWRIGHT_CACHE by a hash of all that it depends on; a changed line of ours,
another torch or Triton, another graph, kernel or checkpoint is another check.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from ..formats.atomic import write_atomic
from ..formats.weights import Held, Stored, Weight, weight_leaves
from ..ir.graph import Graph
from ..settings import current
from .graphs import LoweredGraphs

FOLDER = "verified"
_PACKAGES = ("autotune", "codegen", "compiler", "formats", "ir", "passes", "runtime", "targets")


def check_key(
    graphs: Sequence[Graph], lowered: LoweredGraphs, weights: Mapping[str, Weight]
) -> str | None:
    """A hash of what a check compares; None where the weights are in memory, and so without a name.

    Args:
        graphs: the captured graph and those after each pass.
        lowered: what the backend made of the last one.
        weights: values of the graphs' params.
    """
    leaves = [leaf for weight in weights.values() for leaf in weight_leaves(weight)]
    if any(isinstance(leaf, Held) for leaf in leaves):
        return None
    digest = hashlib.sha256()
    for part in _parts(graphs, lowered, weights, leaves):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(
    graphs: Sequence[Graph],
    lowered: LoweredGraphs,
    weights: Mapping[str, Weight],
    leaves: Iterable[Weight],
) -> Iterator[bytes]:
    yield code_digest().encode()
    yield f"{torch.__version__} {_triton()}".encode()
    yield from (str(graph).encode() for graph in graphs)
    for part in (lowered.general, lowered.decode):
        if part is not None:
            yield json.dumps(part.program.to_json()).encode()
    for name, content in sorted(lowered.files.items()):
        yield name.encode()
        yield hashlib.sha256(content).digest()
    for name, weight in sorted(weights.items()):
        yield f"{name} = {weight}".encode()
    files = {f for leaf in leaves if isinstance(leaf, Stored) for f in leaf.checkpoint.files()}
    for path in sorted(files):
        facts = path.stat()
        yield f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()


def remembered(key: str | None) -> float | None:
    """The largest error of a check that passed, None where it was never made."""
    if key is None:
        return None
    try:
        error = json.loads(_path(key).read_text(encoding="utf-8"))["largest_error"]
    except (OSError, ValueError, LookupError, TypeError):  # absent or damaged: check again
        return None
    return float(error) if isinstance(error, int | float) and math.isfinite(error) else None


def remember(key: str | None, error: float) -> None:
    """Keeps that a check passed; a cache that cannot be written is no error."""
    if key is None:
        return
    try:
        _path(key).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_path(key), json.dumps({"largest_error": error}))
    except OSError:
        return


def _path(key: str) -> Path:
    return current().cache / FOLDER / f"{key}.json"


@cache
def code_digest() -> str:
    """A hash of our own source."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"
