"""What a program says: texts, turns, and what is left for the model to fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

from ...errors import UsageError
from ...runtime.params import SamplingParams
from ...runtime.structured import BRIEF_SPACES, StructuredOutputsParams

Role: TypeAlias = Literal["system", "user", "assistant"]


class Sampling(TypedDict, total=False):
    """What `gen` takes of `SamplingParams`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    seed: int
    priority: int


@dataclass(frozen=True, slots=True)
class Gen:
    """Text that the model writes. `gen` makes it."""

    name: str
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Select:
    """The one of some texts that the model finds likeliest. `select` makes it."""

    name: str
    options: tuple[str, ...]


Part: TypeAlias = "str | Gen | Select"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. `system`, `user` and `assistant` make it."""

    role: Role
    parts: tuple[Part, ...]


def gen(
    name: str,
    *,
    json_schema: str | Mapping[str, object] | None = None,
    regex: str | None = None,
    choices: Iterable[str] | None = None,
    grammar: str | None = None,
    **sampling: Unpack[Sampling],
) -> Gen:
    """Text that the model writes.

    Args:
        name: of the variable.
        json_schema, regex, choices, grammar: the form that it must have, at most one of them; see
            `StructuredOutputsParams`. JSON stays text, for `json.loads`.
        sampling: fields of `SamplingParams`; greedy, and at most 256 tokens, if left out.

    Raises:
        UsageError: a name, form or field that cannot be taken.
    """
    _check_name(name)
    if unknown := set(sampling) - set(Sampling.__annotations__):
        raise UsageError(
            f"gen {name!r}",
            expected=f"only {', '.join(Sampling.__annotations__)}, and one form",
            found=", ".join(sorted(unknown)),
            remedy="Leave it out.",
        )
    return Gen(
        name,
        SamplingParams(
            structured_outputs=_form(name, json_schema, regex, choices, grammar), **sampling
        ),
    )


def select(name: str, options: Iterable[str]) -> Select:
    """The one of some texts that the model finds likeliest to come next.

    Args:
        name: of the variable.
        options: distinct texts, none of them empty.

    Raises:
        UsageError: a name or options that cannot be taken.
    """
    _check_name(name)
    given = () if isinstance(options, str) else tuple(options)
    if not given or not all(isinstance(one, str) and one for one in given):
        raise UsageError(
            f"select {name!r}",
            expected="several texts, none of them empty",
            found=repr(options)[:80],
            remedy="Give the options as a list of str.",
        )
    return Select(name, tuple(dict.fromkeys(given)))


def system(*parts: str) -> Turn:
    """What the model is told to be. UsageError for anything but texts."""
    return Turn("system", _texts("system", parts))


def user(*parts: str) -> Turn:
    """What the user says. UsageError for anything but texts."""
    return Turn("user", _texts("user", parts))


def assistant(*parts: Part) -> Turn:
    """What the model says: texts, `gen` and `select`, in order. UsageError for anything else."""
    for part in parts:
        if not isinstance(part, str | Gen | Select):
            raise _no_part("assistant", "texts, gen or select", part)
    return Turn("assistant", parts)


def _texts(role: str, parts: tuple[Any, ...]) -> tuple[str, ...]:
    for part in parts:
        if not isinstance(part, str):
            raise _no_part(role, "texts", part)
    return parts


def _no_part(role: str, expected: str, found: object) -> UsageError:
    return UsageError(
        f"{role}(…)",
        expected=expected,
        found=repr(found)[:80],
        remedy="Let the model fill assistant(…), and write the rest with f-strings.",
    )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise UsageError(
            "the variable's name",
            expected="a str, not empty",
            found=repr(name)[:80],
            remedy="Name what the model fills, for the program to read it: gen('answer').",
        )


def _form(
    name: str,
    json_schema: str | Mapping[str, object] | None,
    regex: str | None,
    choices: Iterable[str] | None,
    grammar: str | None,
) -> StructuredOutputsParams | None:
    forms = {"json_schema": json_schema, "regex": regex, "choices": choices, "grammar": grammar}
    given = [form for form, value in forms.items() if value is not None]
    if len(given) > 1:
        raise UsageError(
            f"gen {name!r}",
            expected=f"at most one of {', '.join(forms)}",
            found=" and ".join(given),
            remedy="Give the one form that the text must have.",
        )
    if not given:
        return None
    spaces = BRIEF_SPACES if json_schema is not None else None
    return StructuredOutputsParams(
        json=json_schema, regex=regex, choice=choices, grammar=grammar, whitespace_pattern=spaces
    )
