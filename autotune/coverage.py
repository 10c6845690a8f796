"""How much of a space was tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import Value, spelled


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was tried of a space.

    Attributes:
        tried: distinct valid configs that were tried.
        valid: valid configs of the space.
        by_parameter: for each parameter its values in canonical order, and by how many of the
            configs tried each value was had; 0 for those that never were.
    """

    tried: int
    valid: int
    by_parameter: tuple[tuple[str, tuple[tuple[Value, int], ...]], ...]

    @property
    def share(self) -> float:
        """The fraction of the valid configs that was tried; 1 where there are none."""
        return self.tried / self.valid if self.valid else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        return {
            "tried": self.tried,
            "valid": self.valid,
            "share": self.share,
            "by_parameter": {
                name: [{"value": value, "tried": times} for value, times in counts]
                for name, counts in self.by_parameter
            },
        }

    def __str__(self) -> str:
        """A line for the whole, and one for each parameter: `block_m  16: 3  32: 0`."""
        width = max((len(name) for name, _ in self.by_parameter), default=0)
        lines = [f"{self.tried} of {self.valid} valid configs tried ({self.share:.1%})"]
        for name, counts in self.by_parameter:
            cells = "  ".join(f"{spelled(value)}: {times}" for value, times in counts)
            lines.append(f"  {name.ljust(width)}  {cells}")
        return "\n".join(lines)
