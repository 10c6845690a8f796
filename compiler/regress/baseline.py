"""The baseline: a folder of snapshots under version control, readable and diffable.

manifest.json                  what was recorded, when, why, with what; sha256 of every other file
<case>.<target>.json           facts: kernels, launches, figures, hashes of each pass's graph
<case>.<target>.program.json   the Program, a call a line
<case>.<target>.decode.json    that of decode steps, where they have their own
kernels/<name>-<digest8>.txt   sources, shared by cases and targets
graphs/<sha8>.txt              the last graphs of each case, shared too
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...formats.atomic import atomic_folder
from ...settings import current
from .checkout import Checkout
from .collect import Key, versions
from .model import Side
from .snapshot import Snapshot, sha256
from .suite import Suite

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = "tilewright regress record --reason '…'"


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a baseline folder holds.

    Attributes:
        side: where it came from.
        suite: name of the suite.
        suite_digest: sha256 of the suite file.
        snapshots: by case and target.
    """

    side: Side
    suite: str
    suite_digest: str
    snapshots: Mapping[Key, Snapshot]


def write_baseline(
    folder: str | Path, suite: Suite, snapshots: Mapping[Key, Snapshot], reason: str
) -> None:
    """Replaces a baseline folder as a whole; whatever interrupts it leaves the old one.

    Raises:
        UsageError: no reason, a folder that is no baseline, cases of the suite that are missing
            among the snapshots, or a pass limit that is set.
    """
    folder = Path(folder)
    _check_write(folder, suite, snapshots, reason)
    files: dict[str, str] = {}
    for (case, target), snapshot in snapshots.items():
        facts = {k: v for k, v in snapshot.facts().items() if k != "versions"}
        files[f"{case}.{target}.json"] = _json(facts)
        files[f"{case}.{target}.program.json"] = snapshot.program
        files[_graph_file(sha256(snapshot.graph))] = snapshot.graph
        if snapshot.decode is not None:
            files[f"{case}.{target}.decode.json"] = snapshot.decode.program
            files[_graph_file(sha256(snapshot.decode.graph))] = snapshot.decode.graph
        files |= {f"kernels/{kernel.id}.txt": kernel.text for kernel in snapshot.kernels}
    here = Checkout.running()
    manifest = {
        "format": FORMAT,
        "suite": suite.name,
        "suite_sha256": suite.digest,
        "reason": reason.strip(),
        "commit": here.commit,
        "dirty": here.is_dirty,
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": {name: sha256(text) for name, text in sorted(files.items())},
    }
    with atomic_folder(folder) as new:
        for name, text in (*files.items(), (MANIFEST, _json(manifest))):
            path = new / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())


def read_baseline(folder: str | Path) -> Baseline | None:
    """What a baseline folder holds; None where there is none, which a comparison fails.

    Raises:
        UsageError: a damaged file, or one of another format.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise _unreadable(folder / MANIFEST, f"format {FORMAT}", str(manifest["format"]))
        texts = {str(n): _read(folder / n, str(h)) for n, h in manifest["files"].items()}
        side = Side(
            str(folder),
            manifest["commit"],
            str(manifest["recorded"]),
            str(manifest["reason"]),
            {str(name): str(version) for name, version in manifest["versions"].items()},
        )
        found = [
            _snapshot(name, texts, side.versions)
            for name in texts
            if "/" not in name and name.count(".") == 2
        ]
        return Baseline(
            side,
            str(manifest["suite"]),
            str(manifest["suite_sha256"]),
            {(snapshot.case, snapshot.target): snapshot for snapshot in found},
        )
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
        raise _unreadable(folder, "files as this version writes them", said) from error


def _snapshot(name: str, texts: Mapping[str, str], versions: Mapping[str, str]) -> Snapshot:
    facts = json.loads(texts[name])
    sources = {kernel["id"]: texts[f"kernels/{kernel['id']}.txt"] for kernel in facts["kernels"]}
    decode = facts.get("decode")  # older baselines lack it
    if decode is not None:
        program = texts[name.removesuffix(".json") + ".decode.json"]
        decode = {**decode, "graph": texts[_graph_file(decode["graph"])], "program": program}
    return Snapshot.from_json(
        {
            **facts,
            "decode": decode,
            "versions": versions,
            "texts": sources,
            "graph": texts[_graph_file(facts["graph"])],
            "program": texts[name.removesuffix(".json") + ".program.json"],
        }
    )


def _read(path: Path, hash: str) -> str:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != hash:
        raise _unreadable(path, "the content that the manifest has the sha256 of", "another")
    return content.decode()


def _unreadable(path: Path, expected: str, found: str) -> UsageError:
    return UsageError(
        f"baseline {path}",
        expected=expected,
        found=found,
        remedy=f"Restore it from version control, or record it anew: {RECORD}.",
    )


def _check_write(
    folder: Path, suite: Suite, snapshots: Mapping[Key, Snapshot], reason: str
) -> None:
    def wrong(culprit: str, expected: str, found: str, remedy: str) -> UsageError:
        return UsageError(culprit, expected=expected, found=found, remedy=remedy)

    if not reason.strip():
        raise wrong("reason", "why the baseline changes, in words", "none", f"Run {RECORD}.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise wrong(
            str(folder),
            f"a baseline with {MANIFEST}, an empty folder, or nothing",
            "a folder of other files",
            "Name another folder: this one would be replaced.",
        )
    wanted = {(case.name, target) for case in suite.cases for target in case.targets}
    if missing := sorted(wanted - set(snapshots)):
        names = ", ".join(f"{case} on {target}" for case, target in missing)
        raise wrong(
            "snapshots",
            "every case of the suite",
            f"none of {names}",
            "Record the whole suite; what is collected already is not collected again.",
        )
    if current().pass_limit is not None:
        raise wrong(
            "environment variable TILEWRIGHT_PASS_LIMIT",
            "no limit, so that the baseline is of the whole pipeline",
            str(current().pass_limit),
            "Unset it.",
        )


def _graph_file(hash: str) -> str:
    return f"graphs/{hash[:8]}.txt"


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
