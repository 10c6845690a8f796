"""`weights.json`: weights as expressions over a checkpoint that stays where it is.

    {"checkpoint": {"kind": "safetensors", "path": "models/llama",
                    "files": [{"name": "model.safetensors", "bytes": 1024, "sha256": "…"}]},
     "weights": {"model.norm.weight": "cast(stored(\\"model.norm.weight\\"), dtype=\\"float32\\")"}}

The checkpoint is null where all weights are made from seeds. Reading checks every file's hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..errors import EngineError, GraphError, UsageError
from .checkpoint import Checkpoint, open_checkpoint
from .gguf import GGUFCheckpoint
from .hashing import sha256_files
from .weight_base import Weight
from .weight_text import parse_weight
from .weights import Held, Stored, weight_leaves


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint, as it was when the engine was saved."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointReference:
    """A checkpoint by place and content.

    Attributes:
        kind: a GGUF file, or safetensors files of one folder.
        path: the file, or the folder; relative to the working folder unless it is absolute.
        files: what has to be there.
    """

    kind: Literal["gguf", "safetensors"]
    path: str
    files: tuple[FileRecord, ...]

    @staticmethod
    def of(checkpoint: Checkpoint) -> CheckpointReference:
        """Hashes the files of a checkpoint."""
        files = checkpoint.files()
        gguf = isinstance(checkpoint, GGUFCheckpoint)
        hashes = sha256_files(files)
        return CheckpointReference(
            "gguf" if gguf else "safetensors",
            str(files[0] if gguf else files[0].parent),
            tuple(FileRecord(f.name, f.stat().st_size, hashes[f]) for f in files),
        )

    def open(self, place: str | Path | None = None) -> Checkpoint:
        """Opens it after checking size and hash of each file.

        Args:
            place: where the files are now, a folder or a single file; None for `path`.

        Raises:
            EngineError: they are not there, or have changed.
            CheckpointError: they are damaged.
        """
        where = Path(self.path if place is None else place)
        paths = [self._find(where, record) for record in self.files]
        for path, record in zip(paths, self.files, strict=True):
            if (size := path.stat().st_size) != record.bytes:
                raise _changed(path, f"{record.bytes} bytes", f"{size} bytes")
        hashes = sha256_files(paths)
        for path, record in zip(paths, self.files, strict=True):
            if hashes[path] != record.sha256:
                raise _changed(path, f"sha256 {record.sha256}", hashes[path])
        checkpoint = open_checkpoint(paths[0] if len(paths) == 1 else where)
        opened = sorted(path.name for path in checkpoint.files())
        if len(paths) > 1 and opened != sorted(record.name for record in self.files):
            raise _changed(where, f"the files {self._names()}", f"an index of {', '.join(opened)}")
        return checkpoint

    def _find(self, where: Path, record: FileRecord) -> Path:
        folder = where if where.is_dir() else where.parent
        path = where if where.is_file() and len(self.files) == 1 else folder / record.name
        if not path.is_file():
            raise EngineError(
                f"checkpoint {where}",
                expected=f"the {self.kind} files {self._names()}, which the engine refers to",
                found=f"no {record.name}" if where.exists() else "nothing there",
                remedy="Restore them, or name their place: tw.load(…, checkpoint=PATH), or "
                "--checkpoint PATH.",
            )
        return path

    def _names(self) -> str:
        return ", ".join(record.name for record in self.files)


@dataclass(frozen=True, slots=True)
class References:
    """Weights as `weights.json` holds them.

    Attributes:
        checkpoint: that the expressions read, None if they read none.
        texts: expression by weight name.
        held: small tensors by name that the model's code computed, for the engine to keep.
    """

    checkpoint: CheckpointReference | None
    texts: Mapping[str, str]
    held: Mapping[str, torch.Tensor]

    @staticmethod
    def of(weights: Mapping[str, object]) -> References:
        """Describes weights without reading any, but for the hashes of their checkpoint.

        Raises:
            UsageError: weights that no file and no seed backs, or that several checkpoints back.
        """
        leaves = list(_leaves(weights))
        held = {leaf.name: leaf for leaf in leaves if isinstance(leaf, Held)}
        # Beside a checkpoint or a seed, what is held is what the model's code computes, such as
        # rotary frequencies; alone it is a model in memory.
        if held and all(isinstance(leaf, Held) for leaf in leaves):
            raise _not_backed(f"weight {next(iter(held))!r}", "a tensor in memory")
        for leaf in leaves:
            if isinstance(leaf, Held) and held[leaf.name] != leaf:
                raise _not_backed(f"weight {leaf.name!r}", "two tensors of that name in memory")
        stored = {id(x.checkpoint): x.checkpoint for x in leaves if isinstance(x, Stored)}
        texts = {name: str(weight) for name, weight in weights.items()}
        tensors = {name: leaf.read().contiguous() for name, leaf in held.items()}
        return References(_reference(list(stored.values())), texts, tensors)

    def to_json(self) -> dict[str, object]:
        """`weights.json` as plain data; `held` is not in it."""
        checkpoint = None if self.checkpoint is None else asdict(self.checkpoint)
        return {"checkpoint": checkpoint, "weights": dict(self.texts)}

    @staticmethod
    def from_json(data: object, held: Mapping[str, torch.Tensor]) -> References:
        """Reads it back; TypeError, KeyError or ValueError for other data."""
        if not isinstance(data, dict) or not isinstance(texts := data["weights"], dict):
            raise TypeError("weights.json is no object with weights")
        found = data["checkpoint"]
        reference = None if found is None else _read_reference(found)
        return References(reference, {str(k): str(v) for k, v in texts.items()}, held)

    def weights(self, place: str | Path | None = None) -> dict[str, Weight]:
        """The expressions, over the checkpoint as it is opened.

        Args:
            place: of the checkpoint's files, where that is no longer the one they were saved with.

        Raises:
            UsageError: a place, though no file is referred to.
            EngineError: text outside the grammar, or a checkpoint that is missing or changed.
            CheckpointError: a damaged checkpoint.
        """
        if self.checkpoint is None and place is not None:
            raise UsageError(
                f"checkpoint {place}",
                expected="no checkpoint: the weights are made from seeds",
                found="one",
                remedy="Leave it out.",
            )
        checkpoint = None if self.checkpoint is None else self.checkpoint.open(place)
        kept = {name: Held(tensor, name) for name, tensor in self.held.items()}
        resolve, held = _stored_in(checkpoint), _find_in(kept)
        try:
            # One object a text: tied weights are then loaded once.
            parsed = {
                text: parse_weight(text, resolve, held)
                for text in dict.fromkeys(self.texts.values())
            }
        except GraphError as error:
            raise EngineError(
                "weights.json",
                expected="weight expressions as Tilewright writes them",
                found=str(error),
                remedy="Compile the model again.",
            ) from error
        return {name: parsed[text] for name, text in self.texts.items()}


def _leaves(weights: Mapping[str, object]) -> Iterable[Weight]:
    for name, weight in weights.items():
        if not isinstance(weight, Weight):
            raise _not_backed(f"weight {name!r}", "a tensor in the files of another engine")
        yield from weight_leaves(weight)


def _reference(checkpoints: Sequence[Checkpoint]) -> CheckpointReference | None:
    if not checkpoints:
        return None
    files = [file for checkpoint in checkpoints for file in checkpoint.files()]
    if len(checkpoints) > 1 or not files:
        found = f"{len(checkpoints)} of {len(files)} files together"
        raise _not_backed("the weights' checkpoint", found)
    return CheckpointReference.of(checkpoints[0])


def _read_reference(data: object) -> CheckpointReference:
    if not isinstance(data, dict) or data["kind"] not in ("gguf", "safetensors"):
        raise TypeError("weights.json names no checkpoint of a known kind")
    files = tuple(
        FileRecord(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]))
        for entry in data["files"]
    )
    if not files or any(Path(file.name).name != file.name for file in files):
        raise ValueError("weights.json names files that are not beside each other")
    return CheckpointReference(data["kind"], str(data["path"]), files)


def _stored_in(checkpoint: Checkpoint | None) -> Callable[[str], Weight]:
    def resolve(name: str) -> Weight:
        if checkpoint is None:
            raise _unknown(f"stored tensor {name!r}", "a checkpoint that holds it")
        return Stored(checkpoint, name)

    return resolve


def _find_in(kept: Mapping[str, Weight]) -> Callable[[str], Weight]:
    def resolve(name: str) -> Weight:
        if name not in kept:
            raise _unknown(f"held tensor {name!r}", "a tensor that the engine keeps")
        return kept[name]

    return resolve


def _unknown(culprit: str, expected: str) -> GraphError:
    return GraphError(culprit, expected=expected, found="none", remedy="Compile the model again.")


def _not_backed(culprit: str, found: str) -> UsageError:
    return UsageError(
        culprit,
        expected="one checkpoint or seeds behind all weights, to refer to",
        found=found,
        remedy='Save the engine with weights="embed" (the default), which copies the weights.',
    )


def _changed(path: Path, expected: str, found: str) -> EngineError:
    return EngineError(
        f"checkpoint {path}",
        expected=f"{expected}, as when the engine was saved",
        found=found,
        remedy="Restore the files, name another place of them (checkpoint=PATH), or compile the "
        "model again.",
    )
