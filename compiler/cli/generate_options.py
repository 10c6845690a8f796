"""Options of ``tilewright generate``: what takes more than a line, the output's form, beams."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError

if TYPE_CHECKING:
    from ...runtime.params import SamplingParams
    from ...runtime.structured import StructuredOutputsParams
    from ...serving.registry.manifest import Preset

ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Wrap the prompt in the chat template; by default when the model has one.",
    ),
]
StopTokensOption = Annotated[
    list[int] | None, typer.Option(help="Tokens that end it; may be repeated.")
]
LogprobsOption = Annotated[
    int | None, typer.Option(help="With --json: alternatives to report a token.")
]
JsonSchemaOption = Annotated[
    Path | None,
    typer.Option("--json-schema", metavar="FILE", help="The output is JSON of this schema."),
]
RegexOption = Annotated[
    str | None, typer.Option(help="The whole output matches this regular expression.")
]
GrammarOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The output is of this grammar (Lark's EBNF, or GBNF)."),
]
ChoiceOption = Annotated[
    list[str] | None, typer.Option(help="The output is one of these; may be repeated.")
]
PromptLogprobsOption = Annotated[
    int | None, typer.Option(help="With --json: alternatives to report a token of the prompt.")
]
BeamsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Search with N beams, and print the likeliest N outputs."),
]
LengthPenaltyOption = Annotated[
    float, typer.Option(help="Of beams; above 0 long outputs gain.", show_default="1")
]
_SEARCHED = ("max_new_tokens",)  # what beam search takes of the sampling options


def form_of(
    json_schema: Path | None, regex: str | None, grammar: Path | None, choice: list[str] | None
) -> StructuredOutputsParams | None:
    """The form that the options ask for, if any.

    Raises:
        UsageError: several of them, or a file that cannot be read.
    """
    from ...runtime.structured import StructuredOutputsParams

    if json_schema is None and regex is None and grammar is None and not choice:
        return None
    return StructuredOutputsParams(
        json=None if json_schema is None else _read("--json-schema", json_schema),
        regex=regex,
        grammar=None if grammar is None else _read("--grammar", grammar),
        choice=choice or None,
    )


def check_beams(params: SamplingParams) -> None:
    """Refuses sampling options beside ``--beams``, which would have no effect.

    Raises:
        UsageError: naming them.
    """
    default = type(params)()
    others = [
        field.name
        for field in fields(params)
        if field.name not in _SEARCHED
        and getattr(params, field.name) != getattr(default, field.name)
    ]
    if others:
        raise UsageError(
            "option --beams",
            expected="no option of sampling but --max-new-tokens beside it",
            found=", ".join(f"--{name.replace('_', '-')}" for name in others),
            remedy="Leave them out: beam search takes the likeliest outputs as they are.",
        )


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"option {option}",
            expected="a text file that can be read",
            found=f"{path}: {error}",
            remedy="Name a file that holds it.",
        ) from error


def preset_params(params: SamplingParams, preset: Preset, given: typer.Context) -> SamplingParams:
    """The parameters of a model of the registry, but for what was given on the command line."""
    from ...serving.registry.parameters import sampling_fields

    unsaid = {
        name: value
        for name, value in sampling_fields(preset.parameters).items()
        if (source := given.get_parameter_source(name)) is None or source.name == "DEFAULT"
    }
    return replace(params, **unsaid)
