"""Turns an error of torch.export into a CaptureError: the culprit, the cause and the remedy."""

from __future__ import annotations

import os
import traceback

from ..errors import CaptureError

_HERE = os.path.dirname(__file__)

# what the message or type contains → (expected, remedy)
_CAUSES = (
    (
        (
            "GuardOnDataDependentSymNode",
            "data-dependent",
            "Could not guard",
            "is not tracked with proxy",
            "_local_scalar_dense",
        ),
        "control flow that does not depend on the values of tensors",
        "Write it with torch.where or torch.cond, or use torch.compile(model, "
        "backend='tilewright'), which breaks the graph there.",
    ),
    (
        (
            "Constraints violated",
            "ConstraintViolation",
            "dynamic_shapes",
            "specialized",
            "dynamic dims",
        ),
        "dynamic_shapes that the module can keep",
        "Relax or fix the dimension named above in dynamic_shapes.",
    ),
    (
        (
            "Shapes",
            "size mismatch",
            "reduction dim",
            "same dtype",
            "must match",
            "cannot be multiplied",
            "shape '",
            "not broadcastable",
        ),
        "example inputs that the module itself runs on",
        "Run model(*example_inputs) first, and correct the shapes or dtypes.",
    ),
    (
        ("unexpected keyword", "required positional", "positional argument", "missing a required"),
        "example inputs that fit the signature of forward()",
        "Pass one example for each argument without a default.",
    ),
)


def explain(name: str, error: Exception) -> CaptureError:
    """The CaptureError for `error` of torch.export on module `name`, with the user's line."""
    text = f"{type(error).__name__}: {_summary(error)}"
    expected, remedy = next(
        ((wanted, cure) for signs, wanted, cure in _CAUSES if any(sign in text for sign in signs)),
        ("a module that torch.export can follow", "Run torch.export.export for its full report."),
    )
    return CaptureError(f"{name}{_line(error)}", expected=expected, found=text, remedy=remedy)


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]


def _line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [
        frame
        for frame in frames
        if "/torch/" not in frame.filename.replace("\\", "/")
        and not frame.filename.startswith(_HERE)
    ]
    forward = [frame for frame in inside if frame.name == "forward"] or inside[-1:]
    if not forward:
        return ""
    return f" at {forward[-1].filename}:{forward[-1].lineno} ({(forward[-1].line or '').strip()})"
