"""What the typed parameters of a kernel have in common; the kinds are in parameter_kinds.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .config import Value, is_plain, spelled

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial


@dataclass(frozen=True, slots=True)
class When:
    """Where a parameter applies: an earlier parameter, `name`, has one of `values`."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Parameter(ABC):
    """What all parameters have.

    Attributes:
        name: an ASCII identifier; also the name of the parameter in Optuna.
        when: where it applies; None: everywhere.
        otherwise: the value where it does not apply. It need not be one of the options.

    Raises:
        UsageError: a declaration that makes no sense, with the name of the parameter.
    """

    name: str
    when: When | None = field(default=None, kw_only=True)
    otherwise: Value = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isascii() and self.name.isidentifier()):
            raise misuse(repr(self.name), "an ASCII identifier as its name", repr(self.name))
        if not is_plain(self.otherwise):
            raise misuse(self.name, "an `otherwise` that JSON can hold", repr(self.otherwise))
        if self.when is None and self.otherwise is not None:
            raise misuse(self.name, "a `when` beside its `otherwise`", "none")
        self._check()

    @abstractmethod
    def _check(self) -> None:
        """Refuse options that make no sense."""

    @abstractmethod
    def options(self) -> Sequence[Value]:
        """The values it may have where it applies, in canonical order; no two are equal."""

    @abstractmethod
    def suggest(self, trial: BaseTrial) -> Value:
        """The value that a trial of Optuna has for it, in Optuna's terms."""

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """What Optuna draws it from."""

    def to_param(self, value: Value) -> Value:
        """One of the options, in Optuna's terms."""
        return value

    def from_param(self, param: Any) -> Value:
        """The option that Optuna's `param` stands for.

        Raises:
            UsageError: it stands for none.
        """
        for value in self.options():
            if same(self.to_param(value), param):
                return value
        raise misuse(self.name, f"a parameter of Optuna for one of {self.listed()}", repr(param))

    def position(self, value: Value) -> int | None:
        """The index of a value among the options; None: it is none of them."""
        options = self.options()
        if value not in options:
            return None
        index = options.index(value)
        return index if same(options[index], value) else None

    def declared(self) -> dict[str, Any]:
        """All that was declared, as plain data: equal where the parameters are."""
        return {"kind": type(self).__name__, **asdict(self)}

    def listed(self) -> str:
        """The options in words."""
        options = self.options()
        shown = [spelled(value) for value in options[:12]]
        return ", ".join(shown + ["…", spelled(options[-1])] if len(options) > 12 else shown)


def same(one: Value, other: Value) -> bool:
    """Equal and of one type: 1 is not True."""
    return type(one) is type(other) and one == other


def applies(parameter: Parameter, values: Mapping[str, Value]) -> bool:
    """Whether a parameter applies, given the values of those before it."""
    when = parameter.when
    return when is None or any(same(values[when.name], value) for value in when.values)


def misuse(name: str, expected: str, found: str) -> UsageError:
    """The error of a parameter that is declared or set wrongly."""
    return UsageError(
        f"parameter {name}", expected=expected, found=found, remedy="Correct the space."
    )
