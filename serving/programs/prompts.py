"""What stands before a place that the model fills, and what it was filled with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

from ...errors import UsageError
from ...runtime.output import Usage
from .expressions import Gen, Role


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model filled in.

    Attributes:
        text: of it.
        finish_reason: "stop" or "length", as a completion's; "stop" for a choice.
        usage: tokens that it took.
        scores: by option the mean log-probability of its tokens; None but for `select` on an
            engine.
    """

    text: str
    finish_reason: str
    usage: Usage
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Hole:
    """A place that the model fills."""

    name: str
    filled: Future[Outcome]


@dataclass(frozen=True, slots=True)
class Said:
    """A turn, or all of a plain text (no role)."""

    role: Role | None
    parts: tuple[str | Hole, ...]

    def text(self, read: Callable[[Hole], str]) -> str:
        """Its text, with what `read` has for the holes."""
        return "".join(part if isinstance(part, str) else read(part) for part in self.parts)


Saying: TypeAlias = tuple[Said, ...]
"""What is said so far, in order."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads.

    Attributes:
        turns: (role, text) of those that are over; None where the program writes plain text.
        begun: the beginning of the answer, or the plain text; None where no answer is begun.
    """

    turns: tuple[tuple[Role, str], ...] | None
    begun: str | None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns, as chat templates and servers have them."""
        return [{"role": role, "content": text} for role, text in self.turns or ()]


async def prompt_of(saying: Saying, *, answering: bool) -> Prompt:
    """What the model reads of it, once all holes in it are filled.

    Args:
        saying: with holes that are filled on this event loop.
        answering: whether its last turn goes on.

    Raises:
        what a hole failed with.
    """
    for hole in holes(saying):
        # Who gives up waiting does not give up the hole, which others may wait for.
        await asyncio.shield(asyncio.wrap_future(hole.filled))
    texts = [(said.role, said.text(lambda hole: hole.filled.result().text)) for said in saying]
    if saying and saying[0].role is None:
        return Prompt(None, texts[0][1])
    begun = texts.pop()[1] if answering else None
    return Prompt(tuple((role, text) for role, text in texts if role is not None), begun)


def holes(saying: Iterable[Said]) -> Iterable[Hole]:
    """Those in it, in order."""
    return (part for said in saying for part in said.parts if isinstance(part, Hole))


def check_whole(ask: Gen, outcome: Outcome) -> None:
    """Refuses an output that was cut before it had its form.

    Raises:
        UsageError: it was.
    """
    if ask.params.structured_outputs is None or outcome.finish_reason == "stop":
        return
    raise UsageError(
        "its form",
        expected=f"a whole text of it in max_new_tokens={ask.params.max_new_tokens} tokens",
        found=f"one that was cut: …{outcome.text[-60:]!r}",
        remedy="Allow more tokens, shorten the prompt, or ask for a smaller form.",
    )


def total(usages: Sequence[Usage]) -> Usage:
    """Their sum."""
    return Usage(
        sum(one.prompt_tokens for one in usages),
        sum(one.completion_tokens for one in usages),
        sum(one.cached_tokens for one in usages),
    )
