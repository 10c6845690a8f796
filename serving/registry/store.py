"""The registry: models by name, under a folder that several processes may use at once.

blobs/sha256-…              every file once, whatever names refer to it
manifests/NAME=TAG.json     what a name refers to; '+' stands for '/'
views/DIGEST/ROOT           links to the blobs under the names that the model's files had
lock                        held while names come and go
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from ...errors import CheckpointError, UsageError
from ...runtime.blobs import Blob, Blobs, locked, write_document
from .files import GGUF, check_path, files_at, kind_of, root_of
from .manifest import Manifest, Preset, StoredFile, read_manifest, write_manifest
from .names import ModelName, parse_name
from .parameters import check_parameters

Check: TypeAlias = Callable[[Path, "str | None"], object]
"""Raises a TilewrightError for a model, by its path, or a quantization scheme that is none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A name, and what it refers to; None where its manifest is damaged, and why."""

    name: ModelName
    manifest: Manifest | None
    damage: str = ""


class Registry:
    """Models by name.

    Args:
        folder: of the registry; made when something is first added.
        check: of what is added, before it gets its name.
    """

    def __init__(self, folder: Path, check: Check | None = None) -> None:
        self._manifests, self._views = folder / "manifests", folder / "views"
        self._lock, self._check = folder / "lock", check
        self.blobs = Blobs(folder / "blobs")

    def add(
        self,
        path: Path,
        name: ModelName,
        preset: Preset | None = None,
        quantize: str | None = None,
    ) -> Manifest:
        """Gives a model on disk a name; one that has it already gives it up.

        Args:
            path: a .gguf file or a Hugging Face folder. It stays as it is.
            name: of the model.
            preset: how it is asked; None for no particular way.
            quantize: scheme to compile it with.

        Raises:
            CheckpointError, UsageError: what is wrong with the model or the preset.
        """
        files = files_at(path)
        preset = _checked(preset or Preset())
        if self._check is not None:
            self._check(path, quantize)
        # Hashing takes long, and is done before others have to wait.
        stored = tuple(StoredFile(at, self.blobs.take(file)) for at, file in files.items())
        manifest = Manifest(kind_of(files), root_of(path), stored, preset, quantize, _now())
        with locked(self._lock):
            for file in stored:  # unless another process has removed one meanwhile
                if file.blob.digest not in self.blobs:
                    self.blobs.take(files[file.path])
            self._write(name, manifest)
        return manifest

    def create(self, name: ModelName, files: Mapping[str, str], preset: Preset,
               quantize: str | None = None) -> Manifest:  # fmt: skip
        """Gives files that are held already a name.

        Args:
            name: of the model.
            files: path within the model → digest.
            preset: how it is asked.
            quantize: scheme to compile it with.

        Raises:
            UsageError, CheckpointError: files that are not held, or make no model.
        """
        kind, preset = kind_of(map(check_path, files)), _checked(preset)
        stored = tuple(
            StoredFile(at, Blob(digest, _size(self.blobs, digest)))
            for at, digest in sorted(files.items())
        )
        root = name.name.split("/")[-1]
        if kind == "gguf":
            root, stored = stored[0].path.split("/")[-1], (replace(stored[0], path=GGUF),)
        manifest = Manifest(kind, root, stored, preset, quantize, _now())
        if self._check is not None:
            self._check(self.path(manifest), quantize)
        with locked(self._lock):
            for file in stored:
                _size(self.blobs, file.blob.digest)
            self._write(name, manifest)
        return manifest

    def derive(
        self, name: ModelName, source: ModelName, preset: Preset, quantize: str | None = None
    ) -> Manifest:
        """Gives a model another name too, under which it is asked or compiled otherwise.

        Raises:
            UsageError: an unknown source, or what is wrong with the preset.
        """
        preset = _checked(preset)
        if self._check is not None and quantize is not None:
            self._check(self.path(self.read(source)), quantize)
        with locked(self._lock):
            manifest = self.read(source).changed(preset, quantize, _now())
            self._write(name, manifest)
        return manifest

    def copy(self, source: ModelName, target: ModelName) -> None:
        """Gives a model another name too; UsageError for an unknown source."""
        with locked(self._lock):
            self._write(target, self.read(source))

    def remove(self, name: ModelName) -> int:
        """Takes a name away, and the blobs that no other name refers to.

        Returns:
            The bytes of those blobs.

        Raises:
            UsageError: an unknown name.
        """
        with locked(self._lock):
            path = self._file(name)
            if not path.is_file():
                raise self._unknown(name.short)
            try:
                digests = {file.blob.digest for file in self.read(name).files}
            except CheckpointError:  # which they are is not known: `prune` finds them
                digests = set()
            path.unlink()
            return self._release(digests)

    def prune(self) -> int:
        """Removes blobs that no name refers to, such as those that were sent to a server and
        never used, and views; the bytes of the blobs.
        """
        with locked(self._lock):
            shutil.rmtree(self._views, ignore_errors=True)
            self.blobs.sweep()
            return self._release(set(self.blobs.digests()))

    def read(self, name: ModelName) -> Manifest:
        """What a name refers to.

        Raises:
            UsageError: an unknown name.
            CheckpointError: a manifest that is damaged.
        """
        path = self._file(name)
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise self._unknown(name.short) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"manifest {path}",
                expected="a text file",
                found=str(error),
                remedy="Remove the model and add it again.",
            ) from error
        return read_manifest(text, str(path))

    def __contains__(self, name: ModelName) -> bool:
        return self._file(name).is_file()

    def names(self) -> list[ModelName]:
        """All of them, in order."""
        found = []
        for path in self._manifests.glob("*.json"):
            with contextlib.suppress(UsageError):  # something else that lies there
                found.append(parse_name(path.stem.replace("+", "/").replace("=", ":")))
        return sorted(found, key=str)

    def entries(self) -> Iterator[Entry]:
        """What each name refers to."""
        for name in self.names():
            try:
                yield Entry(name, self.read(name))
            except CheckpointError as error:
                yield Entry(name, None, str(error))
            except UsageError:  # removed meanwhile
                continue

    def verify(self, manifest: Manifest, *, whole: bool = True) -> None:
        """Sees that a model's files are what they were: CheckpointError for one that is not."""
        for file in manifest.files:
            self.blobs.check(file.blob, whole=whole)

    def path(self, manifest: Manifest) -> Path:
        """A .gguf file or folder of a model, as every verb takes it, its files checked.

        Raises:
            CheckpointError: a file that is missing or damaged.
        """
        self.verify(manifest, whole=False)
        root = self._views / replace(manifest, quantize=None).checkpoint.replace(":", "-")
        for file in manifest.files:
            within = () if manifest.kind == "gguf" else tuple(check_path(file.path).split("/"))
            place = root.joinpath(check_path(manifest.root), *within)
            _link(place, self.blobs.path(file.blob.digest))
        return root / manifest.root

    def unknown(self, text: str) -> UsageError:
        """The error for a name that nothing is known of."""
        return self._unknown(text)

    def _file(self, name: ModelName) -> Path:
        return self._manifests / f"{name.name.replace('/', '+')}={name.tag}.json"

    def _write(self, name: ModelName, manifest: Manifest) -> None:
        write_document(self._file(name), write_manifest(manifest))

    def _release(self, digests: set[str]) -> int:
        """Removes those that no name refers to; none where a manifest cannot be read."""
        entries = list(self.entries())
        if any(entry.manifest is None for entry in entries):
            return 0
        used = {f.blob.digest for e in entries if e.manifest is not None for f in e.manifest.files}
        return sum(self.blobs.remove(digest) for digest in digests - used)

    def _unknown(self, text: str) -> UsageError:
        known = [name.short for name in self.names()]
        close = difflib.get_close_matches(text.removesuffix(":latest"), known, n=1)
        return UsageError(
            f"model {text[:100]!r}",
            expected=f"a name that is registered: {', '.join(known) or 'there is none'}",
            found="none of them",
            remedy=f"Did you mean {close[0]!r}?"
            if close
            else "Add it: tilewright models add PATH --name NAME.",
        )


def _checked(preset: Preset) -> Preset:
    return replace(preset, parameters=check_parameters(preset.parameters))


def _size(blobs: Blobs, digest: str) -> int:
    path = blobs.path(digest)
    if not path.is_file():
        raise CheckpointError(
            f"blob {digest}",
            expected="one that has been sent",
            found="nothing",
            remedy="Send the file first: POST /api/blobs/DIGEST.",
        )
    return path.stat().st_size


def _link(place: Path, blob: Path) -> None:
    """A relative link, so that the folder may be moved; one that is there already is that one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        place.symlink_to(os.path.relpath(blob, place.parent))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
