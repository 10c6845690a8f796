"""One hierarchy of errors: each names culprit, expectation, finding and remedy."""

from __future__ import annotations

from typing import ClassVar


class TilewrightError(Exception):
    """Base of every error that Tilewright raises on purpose.

    Args:
        culprit: the node, pass, kernel, file, field or option at fault.
        expected: what would have been right (for a wrong option: the valid ones).
        found: what was there instead.
        remedy: what to do next.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, culprit: str, *, expected: str, found: str, remedy: str) -> None:
        self.culprit, self.expected, self.found, self.remedy = culprit, expected, found, remedy
        super().__init__(f"{culprit}: expected {expected}, found {found}. {remedy}")


class UsageError(TilewrightError):
    """A wrong argument, option or input of the caller."""


class CheckpointError(TilewrightError):
    """A model file or folder that is missing, damaged or of an unknown kind."""


class CaptureError(TilewrightError):
    """A module that the frontend cannot turn into a graph."""


class UnsupportedError(TilewrightError):
    """Something that is well-formed, but that a pass, backend or target cannot take."""


class GraphError(TilewrightError):
    """An ill-formed IR graph, or IR text that does not parse."""


class VerificationError(TilewrightError):
    """A pass, kernel or program whose numbers disagree with the reference."""

    exit_code: ClassVar[int] = 1


class EngineError(TilewrightError):
    """An engine folder that is missing, damaged, or made for something else."""


class KernelError(EngineError):
    """A compiled kernel that the driver of this machine does not take."""


class CapacityError(TilewrightError):
    """Not enough memory, pages or context for what was asked."""
