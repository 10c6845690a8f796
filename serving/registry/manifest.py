"""What is known of a model under a name: its files, and how it is to be asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ...errors import CheckpointError
from ...runtime.blobs import Blob

FORMAT_VERSION = 1
Kind: TypeAlias = Literal["gguf", "folder"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a model: its path within it, with '/', and the blob that holds it."""

    path: str
    blob: Blob


@dataclass(frozen=True, slots=True)
class Preset:
    """How a model is asked where a request says nothing else: a Modelfile, in short.

    Attributes:
        system: the system message of conversations that have none.
        parameters: of the sampling, under Ollama's names.
        template_options: what the chat template reads, such as ``enable_thinking``.
    """

    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, other: Preset) -> Preset:
        """This one, with what the other says."""
        return Preset(
            self.system if other.system is None else other.system,
            {**self.parameters, **other.parameters},
            {**self.template_options, **other.template_options},
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model under a name.

    Attributes:
        kind: a .gguf file, or a Hugging Face folder.
        root: what the file or folder is called.
        files: of it.
        preset: how it is asked.
        quantize: scheme that its linears are compiled with; None for none.
        created: when, in ISO 8601, UTC.
    """

    kind: Kind
    root: str
    files: tuple[StoredFile, ...]
    preset: Preset = Preset()
    quantize: str | None = None
    created: str = ""

    @property
    def checkpoint(self) -> str:
        """A digest of the files and the scheme: models that share it can share an engine."""
        parts = [self.kind, self.quantize, [[one.path, one.blob.digest] for one in self.files]]
        return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(one.blob.size for one in self.files)

    @property
    def digest(self) -> str:
        """Of the manifest; a copy under another name has the same."""
        return _digest(self.to_json())

    def changed(self, preset: Preset, quantize: str | None, created: str) -> Manifest:
        """The same files, to be asked or compiled otherwise."""
        return replace(
            self,
            preset=self.preset.changed(preset),
            quantize=quantize or self.quantize,
            created=created,
        )

    def to_json(self) -> dict[str, Any]:
        """As it is written, without its own digest."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "root": self.root,
            "files": [{"path": one.path, **asdict(one.blob)} for one in self.files],
            **asdict(self.preset),
            "quantize": self.quantize,
            "created": self.created,
        }


def write_manifest(manifest: Manifest) -> str:
    """A manifest as text, which holds its own digest."""
    data = manifest.to_json()
    return json.dumps({**data, "self": _digest(data)}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(text: str, where: str) -> Manifest:
    """A manifest from its text.

    Raises:
        CheckpointError: damaged, or of another version.
    """
    try:
        data = json.loads(text)
        found = data.pop("self")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise _damaged(where, "JSON with a digest of itself", f"{error}") from error
    if found != (expected := _digest(data)):
        raise _damaged(where, f"the digest of its content, {expected}", str(found))
    if data.get("format") != FORMAT_VERSION:
        raise _damaged(where, f"format {FORMAT_VERSION}", f"format {data.get('format')}")
    return Manifest(
        data["kind"],
        data["root"],
        tuple(StoredFile(f["path"], Blob(f["digest"], f["size"])) for f in data["files"]),
        Preset(data["system"], data["parameters"], data["template_options"]),
        data["quantize"],
        data["created"],
    )


def _digest(data: Mapping[str, Any]) -> str:
    """Of a manifest without its own digest, whatever its layout."""
    text = json.dumps(data, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _damaged(where: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"manifest {where}",
        expected=expected,
        found=found,
        remedy="Remove the model and add it again: tilewright models remove NAME, add PATH.",
    )
