"""What a reply to a request is, whatever the API: objects, and how a stream of them is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from pydantic_core import PydanticSerializationError, to_json

from ..runtime.output import Completion, Delta


class Reply(Protocol):
    """Turns what the engine gives into what a client reads.

    Attributes:
        media_type: of a stream.
        done: what ends a stream that has not failed.
    """

    media_type: ClassVar[str]
    done: ClassVar[bytes]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer to a request that does not stream; completions by prompt."""
        ...

    def pieces(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a stream sends for a delta of so many-th prompt."""
        ...

    def closing(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """What a stream sends when all have ended."""
        ...

    def broken(self, status: int, message: str) -> dict[str, Any]:
        """What a stream sends when it fails: its status was sent long ago."""
        ...

    def frame(self, data: dict[str, Any]) -> bytes:
        """One object of a stream, as it is written."""
        ...


def written(data: dict[str, Any]) -> bytes:
    """JSON in one line; half a surrogate pair, which no UTF-8 has, as a question mark."""
    try:
        return to_json(data)
    except PydanticSerializationError:
        return json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")
