"""Engines of a suite's cases, each compiled by the code that it is to be timed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....errors import EngineError
from ....formats.atomic import atomic_folder
from ....settings import current
from ...bench.machine import package_versions
from ..checkout import Checkout, run_in
from .device import PACKAGES


@dataclass(frozen=True, slots=True)
class EngineCase:
    """What is compiled.

    Attributes:
        name: of the case.
        model: a folder or file that ``tilewright compile`` takes.
        options: of the command line.
        target: to compile for.
        definition: hash of what the model is; its place may stay the same when it changes.
    """

    name: str
    model: str
    options: Sequence[str]
    target: str
    definition: str = ""


def prepare_engine(checkout: Checkout, case: EngineCase, digest: str) -> Path:
    """The engine of a case, compiled by a checkout's own code; one that was made before is reused.

    Args:
        checkout: whose code compiles.
        case: what.
        digest: of the checkout's code.

    Raises:
        EngineError: that code does not compile the case; what it said is in the message.
    """
    key: Mapping[str, object] = {
        "code": digest,
        "case": [case.name, case.model, list(case.options), case.target, case.definition],
        "passes": current().pass_limit,
        "versions": package_versions(PACKAGES),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = current().cache / "regress" / "engines" / name
    if (folder / "engine" / "manifest.json").is_file():
        return folder / "engine"
    with atomic_folder(folder) as beside:
        arguments = [case.model, "-o", str(beside / "engine"), "--target", case.target]
        done = run_in(checkout, "__main__", ["compile", *arguments, *case.options])
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise EngineError(
                f"case {case.name} for {case.target}",
                expected=f"an engine, compiled by {checkout.root}",
                found=" ".join(line.strip() for line in said[-4:]),
                remedy="Compile it by hand with that checkout.",
            )
        (beside / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    return folder / "engine"
