"""The templates that are tuned."""

from __future__ import annotations

from ....errors import UsageError
from .attention import PagedAttention
from .coded_linear import QuantGemm, QuantGemv
from .decode import PagedDecode
from .dense_attention import DenseAttention
from .experts import ExpertGroups, ExpertRows
from .linear import LinearGemm, LinearGemv
from .scaled import ScaledAttention, ScaledDecode
from .template import Template
from .walks import Elementwise, Rows
from .wide_linear import WideLinear

TEMPLATES: tuple[Template, ...] = (
    LinearGemv(),
    LinearGemm(),
    QuantGemv(),
    QuantGemm(),
    PagedDecode(),
    PagedAttention(),
    ScaledDecode(),
    ScaledAttention(),
    DenseAttention(),
    ExpertRows(),
    ExpertGroups(),
    Rows(),
    Elementwise(),
    WideLinear(),
)


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
