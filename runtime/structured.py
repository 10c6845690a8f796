"""What form an output must have, as the user says it. `grammar.py` holds tokens to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import UsageError

KINDS = ("json", "regex", "choice", "grammar", "json_object")
# Between the tokens of JSON, as llama.cpp has it: small models would put spaces there for ever.
BRIEF_SPACES = r"( |\n[ \t]{0,20})?"


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of an output; exactly one of the first five. The names are vLLM's.

    Attributes:
        json: a JSON schema, as a dict or as text; kept as text. Properties come in its order. A
            keyword that cannot be held to is refused.
        regex: an expression that the whole output matches, in the syntax of Rust's regex crate
            (no look-around, no back references).
        choice: strings, of which the output is one. Kept as a tuple.
        grammar: a context-free grammar with a rule `start` (Lark's EBNF) or `root` (GBNF).
        json_object: whether the output is any JSON object.
        disable_any_whitespace: no spaces or line breaks between the tokens of JSON.
        whitespace_pattern: a regex of what may stand between the tokens of JSON; None for any run
            of spaces, tabs and line breaks.

    Raises:
        UsageError: a field of the wrong type, or not exactly one form.
    """

    json: str | Mapping[str, object] | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for field in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, str):
                raise wrong(field, "None, or text", value)
        for field in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, field), bool):
                raise wrong(field, "True or False", getattr(self, field))
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise UsageError(
                "StructuredOutputsParams",
                expected=f"exactly one of {', '.join(KINDS)}",
                found=" and ".join(given) or "none of them",
                remedy="Give the one form that the output must have.",
            )
        spaces = self.disable_any_whitespace or self.whitespace_pattern is not None
        if spaces and self.kind not in ("json", "json_object"):
            field = (
                "disable_any_whitespace" if self.disable_any_whitespace else "whitespace_pattern"
            )
            raise wrong(field, "json or json_object beside it", self.kind)

    @property
    def kind(self) -> str:
        """The name of the form that is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def wrong(field: str, valid: str, found: object) -> UsageError:
    """The error of a field that cannot be taken."""
    return UsageError(
        f"StructuredOutputsParams.{field}",
        expected=valid,
        found=repr(found)[:200],
        remedy=f"Pass a valid {field}.",
    )


def _schema_text(schema: object) -> str:
    valid = "a JSON schema, as a dict or as text"
    if not isinstance(schema, str | Mapping):
        raise wrong("json", valid, schema)
    try:
        if isinstance(schema, str):
            json.loads(schema)
            return schema
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong("json", valid, str(error)) from error


def _choices(choices: object) -> tuple[str, ...]:
    valid = "several strings"
    if not isinstance(choices, Iterable) or isinstance(choices, str):
        raise wrong("choice", valid, choices)
    strings = tuple(choices)
    if not strings or not all(isinstance(one, str) for one in strings):
        raise wrong("choice", valid, strings)
    return tuple(dict.fromkeys(strings))
