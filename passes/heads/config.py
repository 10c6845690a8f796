"""What a user asks of the conversion of heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError

METHODS = ("svd", "mean")
_PREFIX = "gqa:"


@dataclass(frozen=True, slots=True)
class GQA:
    """Fewer KV heads: ``tw.compile(…, attention=tw.GQA(4))``, or ``"mqa"`` for ``GQA(1)``.

    What is not valid raises UsageError when the model is compiled.

    Attributes:
        groups: KV heads that are left, a divisor of those that a model has.
        method: "svd": keys and values of least squares that the heads of a group share, each head
            reading them through a map of its own; "mean": the mean of a group's heads (Ainslie et
            al., 2305.13245); None for "svd" where activations are looked at, else "mean": least
            squares of weights alone lose more.
        align: whether "mean" first turns heads towards each other, which alone loses nothing.
            "svd" contains it.
        regroup: whether heads that are alike share; else neighbours do.
        calibrate: a text file that says which inputs count; None for the text that comes with the
            package.
        tokens: of the text, that are read at most; 0 to go by the weights alone, as is done for
            models without a tokenizer.
        seed: picks where in the text the samples begin.
        report: whether the quality is measured: perplexity, divergence, top-1 agreement.
        report_text: a text file to measure on; None for the text that comes with the package.
        report_tokens: of that text, that are read at most.
    """

    groups: int
    method: str | None = None
    align: bool = True
    regroup: bool = True
    calibrate: str | Path | None = None
    tokens: int = 4096
    seed: int = 0
    report: bool = False
    report_text: str | Path | None = None
    report_tokens: int = 4096


def resolve_heads(attention: object) -> GQA | None:
    """The option ``attention`` of a compile: None, "mqa", "gqa:GROUPS" or a GQA.

    Raises:
        UsageError: anything else, or a field that is not valid.
    """
    if attention is None:
        return None
    found = _named(attention) if isinstance(attention, str) else attention
    if not isinstance(found, GQA):
        raise _wrong("attention", attention, "'mqa', 'gqa:GROUPS', GQA(groups) or None")
    for name, least in (("groups", 1), ("tokens", 0), ("seed", 0), ("report_tokens", 2)):
        value = getattr(found, name)
        if type(value) is not int or value < least:
            raise _wrong(f"GQA.{name}", value, f"an integer of {least} or more")
    for name in ("align", "regroup", "report"):
        if type(getattr(found, name)) is not bool:
            raise _wrong(f"GQA.{name}", getattr(found, name), "True or False")
    if found.method not in (*METHODS, None):
        raise _wrong("GQA.method", found.method, f"one of {', '.join(METHODS)} or None")
    return found


def _named(text: str) -> GQA | None:
    if text == "mqa":
        return GQA(1)
    count = text.removeprefix(_PREFIX)
    named = text.startswith(_PREFIX) and count.isascii() and count.isdigit()
    return GQA(int(count)) if named else None


def _wrong(option: str, found: object, expected: str) -> UsageError:
    return UsageError(
        f"option {option}",
        expected=expected,
        found=repr(found),
        remedy="Choose one of those.",
    )
