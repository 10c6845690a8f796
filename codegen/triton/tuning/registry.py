"""The templates that are tuned."""

from __future__ import annotations

from ....errors import UsageError
from .attention import Attention
from .decode import PagedDecode
from .linear import LinearGemm, LinearGemv
from .template import Template

TEMPLATES: tuple[Template, ...] = (LinearGemv(), LinearGemm(), PagedDecode(), Attention())


def template_named(name: str) -> Template:
    """The template of a name; UsageError for another, with those that exist."""
    for template in TEMPLATES:
        if template.name == name:
            return template
    raise UsageError(
        f"template {name!r}",
        expected=f"one of {', '.join(template.name for template in TEMPLATES)}",
        found=repr(name),
        remedy="Name one of these.",
    )
