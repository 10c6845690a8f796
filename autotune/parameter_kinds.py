"""The kinds of parameters that a kernel declares, and how each one maps to Optuna.

Optuna keeps a categorical value as its position in the tuple of choices, and an integer as a
float. What either would confuse (1 and True; integers beyond 2**53) is refused on declaration.
A power of two is suggested by its exponent, so that neighbours are one step apart for the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import Value, is_plain
from .parameters import Parameter, misuse

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.trial import BaseTrial

_LARGEST = 2**53  # the integers up to here are exact as a float64


@dataclass(frozen=True)
class PowerOfTwo(Parameter):
    """The powers of two from `low` to `high`, both included and both powers of two."""

    low: int
    high: int

    def _check(self) -> None:
        for end in (self.low, self.high):
            if type(end) is not int or end < 1 or end & (end - 1) or end > _LARGEST:
                raise misuse(self.name, "powers of two as its ends", repr(end))
        if self.low > self.high:
            raise misuse(self.name, "low <= high", f"{self.low} and {self.high}")

    def options(self) -> Sequence[Value]:
        return tuple(1 << exponent for exponent in self._exponents())

    def suggest(self, trial: BaseTrial) -> Value:
        exponents = self._exponents()
        return trial.suggest_int(self.name, exponents[0], exponents[-1])

    def distribution(self) -> IntDistribution:
        from optuna.distributions import IntDistribution

        exponents = self._exponents()
        return IntDistribution(exponents[0], exponents[-1])

    def to_param(self, value: Value) -> Value:
        assert isinstance(value, int)
        return value.bit_length() - 1

    def _exponents(self) -> range:
        return range(self.low.bit_length() - 1, self.high.bit_length())


@dataclass(frozen=True)
class Integer(Parameter):
    """The integers `low`, `low + step`, … up to `high` at most."""

    low: int
    high: int
    step: int = 1

    def _check(self) -> None:
        if any(type(n) is not int or abs(n) > _LARGEST for n in (self.low, self.high, self.step)):
            raise misuse(self.name, "integers within 2**53", f"{self.low}, {self.high}")
        if self.step < 1 or self.low > self.high:
            found = f"{self.low}, {self.high}, step {self.step}"
            raise misuse(self.name, "low <= high and a positive step", found)

    def options(self) -> Sequence[Value]:
        return range(self.low, self.high + 1, self.step)

    def suggest(self, trial: BaseTrial) -> Value:
        # Optuna warns where the step does not divide the range: we hand it the true last value.
        return trial.suggest_int(self.name, self.low, self._last(), step=self.step)

    def distribution(self) -> IntDistribution:
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self._last(), step=self.step)

    def from_param(self, param: Any) -> Value:
        if self.position(param) is None:
            raise misuse(self.name, f"one of {self.listed()}", repr(param))
        return int(param)

    def _last(self) -> int:
        return range(self.low, self.high + 1, self.step)[-1]


@dataclass(frozen=True)
class Choice(Parameter):
    """One of some values, in the order that they are given in."""

    values: tuple[Value, ...]

    def _check(self) -> None:
        if not isinstance(self.values, tuple) or not self.values:
            raise misuse(self.name, "a tuple of one value at least", repr(self.values))
        for index, value in enumerate(self.values):
            if not is_plain(value):
                raise misuse(self.name, "values that JSON can hold", repr(value))
            if value in self.values[:index]:
                expected = "values that Optuna can tell apart (1, 1.0 and True are equal)"
                raise misuse(self.name, expected, f"{value!r} twice")

    def options(self) -> Sequence[Value]:
        return self.values

    def suggest(self, trial: BaseTrial) -> Value:
        return trial.suggest_categorical(self.name, self.values)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Boolean(Parameter):
    """False or True, in this order."""

    def _check(self) -> None:
        pass

    def options(self) -> Sequence[Value]:
        return (False, True)

    def suggest(self, trial: BaseTrial) -> Value:
        return trial.suggest_categorical(self.name, (False, True))

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution((False, True))
