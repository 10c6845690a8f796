"""Chat templates: jinja2 source from a model file, rendered in jinja2's sandbox.

The variables, filters and settings are those of Hugging Face's chat templates
(huggingface.co/docs/transformers/chat_templating), so that templates written for it work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from jinja2 import Template


# What a template raises when it meets what it was not written for.
_FROM_TEMPLATES = (TypeError, ValueError, ArithmeticError, LookupError, RecursionError)


def render_chat(template: str, variables: Mapping[str, object]) -> str:
    """Render a chat template.

    Args:
        template: jinja2 source.
        variables: `messages`, `add_generation_prompt`, `bos_token`, …: plain JSON data. It is
            copied through JSON, so that a template can reach no method of the caller's objects.

    Raises:
        UsageError: the template is broken, refuses the messages, or the variables are no JSON data.
    """
    from jinja2 import TemplateError

    try:
        plain = json.loads(json.dumps(variables))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            "messages",
            expected="a list of messages made of str, numbers, lists and dicts",
            found=str(error),
            remedy="Pass plain data.",
        ) from error
    try:
        return _compile(template).render(**plain)
    except (TemplateError, *_FROM_TEMPLATES) as error:
        raise UsageError(
            "chat template",
            expected="messages that the model's template takes",
            found=f"{type(error).__name__}: {error}",
            remedy="Check roles and their order, or pass the prompt as plain text.",
        ) from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks the assistant's text between generation and endgeneration; here it is plain."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    helpers: dict[str, Callable[..., object]] = {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    environment.globals.update(helpers)
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the models saw it in training: jinja2's own filter escapes HTML and sorts keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
