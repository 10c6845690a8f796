"""What a rule sees: one step with its operands as values, and its attributes by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from onnx import defs
from torch import Tensor

from ...errors import UnsupportedError
from .model import Attribute, Step
from .values import Known, Size, Value, tensor_of

Result: TypeAlias = "Value | tuple[Value | None, ...]"
Rule: TypeAlias = "Callable[[Call], Result]"
KnownRule: TypeAlias = "Callable[[Call], Value | None]"
"""A rule over what is known while tracing; None where that does not suffice."""


OURS = "tilewright"
"""The domain of steps that the reader makes."""
_RULES_OPSET = 24  # what the rules were written for


@dataclass(frozen=True, slots=True)
class Call:
    """One step. Accessors raise UnsupportedError that names the node.

    Attributes:
        step: the node.
        values: its operands, None for those left out.
        makers: the step that made a value, by its name.
        every: all values so far, by name.
        read: the attributes that the rule has asked for.
    """

    step: Step
    values: tuple[Value | None, ...]
    makers: Mapping[str, Step]
    every: Mapping[str, Value]
    read: set[str] = field(default_factory=set)

    def value(self, index: int) -> Value | None:
        """An operand, None where it is left out."""
        return self.values[index] if index < len(self.values) else None

    def needed(self, index: int) -> Value:
        """An operand that must be there."""
        found = self.value(index)
        if found is None:
            self.refuse(f"an operand {index}", "none")
        return found

    def tensor(self, index: int) -> Tensor:
        """An operand that must be there, as a tensor."""
        return tensor_of(self.needed(index))

    def maybe(self, index: int) -> Tensor | None:
        """An operand as a tensor, None where it is left out."""
        found = self.value(index)
        return None if found is None else tensor_of(found)

    def known(self, index: int) -> Known | None:
        """An operand, if it is one whose elements are known."""
        found = self.value(index)
        return found if isinstance(found, Known) else None

    def sizes(self, index: int) -> list[Size] | None:
        """The elements of an operand of integers, None where it is left out."""
        found = self.value(index)
        if found is None:
            return None
        if not isinstance(found, Known):
            name = self.step.inputs[index]
            self.refuse(
                f"{name!r} to follow from sizes and constants", "numbers that depend on data"
            )
        return found.items

    def integers(self, index: int) -> list[int] | None:
        """As `sizes`, without symbols."""
        found = self.sizes(index)
        if found is not None and not all(isinstance(item, int) for item in found):
            self.refuse(f"constants in {self.step.inputs[index]!r}", f"{found}")
        return found

    def constant(self, name: str) -> float | None:
        """The number that a value of one element is known to be."""
        found = self.every.get(name)
        if not isinstance(found, Known) or found.array.size != 1:
            return None
        number = found.items[0]
        return number if isinstance(number, int | float) else None

    def attribute(self, name: str) -> Attribute | None:
        """An attribute, None where the file leaves it out."""
        self.read.add(name)
        return self.step.attributes.get(name)

    def integer(self, name: str, default: int) -> int:
        """An attribute of type INT."""
        self.read.add(name)
        return self.step.integer(name, default)

    def number(self, name: str, default: float) -> float:
        """An attribute of type FLOAT."""
        self.read.add(name)
        return self.step.number(name, default)

    def text(self, name: str, default: str) -> str:
        """An attribute of type STRING."""
        found = self.attribute(name)
        return default if found is None else str(found)

    def ints(self, name: str) -> list[int] | None:
        """An attribute of type INTS, None where the file leaves it out."""
        self.read.add(name)
        return self.step.integers(name)

    def wants(self, index: int) -> bool:
        """Whether a result has a name."""
        return index < len(self.step.outputs) and bool(self.step.outputs[index])

    def allow(self, name: str, *values: object) -> None:
        """Refuses an attribute of another value."""
        found = self.attribute(name)
        if found is not None and found not in values:
            self.refuse(f"{name} of {' or '.join(map(str, values))}", f"{name}={found}")

    def check_read(self) -> None:
        """Refuses attributes that the rule cannot know: later opsets bring new ones, and other
        domains have no schema.
        """
        step = self.step
        if step.domain == OURS:
            return
        known = self.read
        if not step.domain and defs.has(step.op, max_inclusive_version=_RULES_OPSET):
            known = known | set(defs.get_schema(step.op, _RULES_OPSET).attributes)
        unknown = step.attributes.keys() - known
        if unknown:
            self.refuse("attributes that its rule knows", ", ".join(sorted(unknown)))

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Raises the UnsupportedError that names this node."""
        raise UnsupportedError(
            str(self.step),
            expected=expected,
            found=found,
            remedy="Export the model without it, or compile the PyTorch model that it came from.",
        )
