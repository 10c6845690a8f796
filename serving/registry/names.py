"""Names of models, as Ollama has them: NAME, NAME:TAG, OWNER/NAME:TAG."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import UsageError

LATEST = "latest"
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_MOST_PARTS = 3  # host, owner, name
_LONGEST = 200  # it is the name of a file too


@dataclass(frozen=True, slots=True)
class ModelName:
    """A name and its tag, in lower case: names that differ in case alone are one, as not every
    file system could tell them apart.
    """

    name: str
    tag: str = LATEST

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"

    @property
    def short(self) -> str:
        """Without the tag where it goes without saying."""
        return self.name if self.tag == LATEST else str(self)


def parse_name(text: str) -> ModelName:
    """A name from what a user or client wrote.

    Raises:
        UsageError: what is none; it might be a path that leads out of the registry.
    """
    name, colon, tag = text.lower().partition(":")
    parts = name.split("/")
    good = len(text) <= _LONGEST and len(parts) <= _MOST_PARTS
    good = good and all(_PART.fullmatch(part) for part in parts)
    if not good or (colon and not _PART.fullmatch(tag)):
        raise UsageError(
            "model name",
            expected="NAME or NAME:TAG, each of up to 80 letters, digits, '.', '_' and '-', the "
            "first of them a letter or digit; owners go in front: OWNER/NAME",
            found=repr(text[:100]),
            remedy="Choose a name like 'smollm2:135m'.",
        )
    return ModelName(name, tag if colon else LATEST)


def name_of_path(stem: str) -> ModelName:
    """A name made from that of a file or folder; what cannot be in a name becomes '-'.

    Raises:
        UsageError: nothing is left of it.
    """
    return parse_name(re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:80])
