"""Models by name, where a path may be given too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..serving.registry.manifest import Preset
from ..serving.registry.names import parse_name
from ..serving.registry.store import Registry
from ..settings import current

if TYPE_CHECKING:
    from ..serving.catalog import Catalog
    from ..serving.registry.manifest import Manifest
    from ..serving.registry.names import ModelName

FOLDER = "models"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a user named: a path, and what the registry has of it if it was a name there."""

    path: str
    name: ModelName | None = None
    manifest: Manifest | None = None

    @property
    def preset(self) -> Preset:
        """How it is asked, where the registry knows."""
        return Preset() if self.manifest is None else self.manifest.preset

    @property
    def short(self) -> str:
        """The name, or that of the file or folder."""
        return Path(self.path).stem if self.name is None else self.name.short

    def catalog(self) -> Catalog:
        """What a server of it knows of names."""
        from ..serving.catalog import Catalog  # needs pydantic, as only servers do

        checkpoint = None if self.manifest is None else self.manifest.checkpoint
        return Catalog(open_registry(), checkpoint, self.preset)


def open_registry() -> Registry:
    """The registry of this user, under TILEWRIGHT_CACHE."""
    return Registry(current().cache / FOLDER, _check)


def choose(named: str) -> Chosen:
    """A path of this machine as it is, else a model of the registry.

    Raises:
        UsageError: neither.
        CheckpointError: a model of the registry that is damaged.
    """
    if Path(named).exists():
        return Chosen(named)
    registry = open_registry()
    try:
        name = parse_name(named)
    except UsageError:  # a path that is not there, by its look
        raise _nothing(named, registry) from None
    if name not in registry:
        raise _nothing(named, registry)
    manifest = registry.read(name)
    return Chosen(str(registry.path(manifest)), name, manifest)


def _nothing(named: str, registry: Registry) -> UsageError:
    error = registry.unknown(named)
    return UsageError(
        named,
        expected=f"an engine folder, a model folder or a .gguf file; or {error.expected}",
        found="nothing there, and no such name",
        remedy=f"Check the path; models are not downloaded. {error.remedy}",
    )


def _check(path: Path, quantize: str | None) -> None:
    """Sees that a model's files can be read, and that there is such a scheme."""
    from ..formats.checkpoint import open_checkpoint
    from ..passes.schemes import STORED, resolve_config

    if quantize is not None and quantize not in STORED:
        resolve_config(quantize, None, STORED)
    open_checkpoint(path)
