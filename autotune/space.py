"""The space of configs of a kernel: its parameters in order, and what must hold between them.

Whatever names a config does so by the canonical order (product.py), which therefore depends
neither on the process nor on what was measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .config import Config, Value
from .coverage import Coverage
from .parameter_kinds import Boolean, Choice, Integer, PowerOfTwo
from .parameters import Parameter, When, applies, misuse, same
from .product import Product

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

__all__ = [
    "Boolean",
    "Choice",
    "Config",
    "Constraint",
    "Coverage",
    "Integer",
    "Parameter",
    "PowerOfTwo",
    "Space",
    "Value",
    "When",
]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What must hold between the parameters of a valid config.

    Attributes:
        reason: why a config that fails is not valid, in words. It stands for the constraint in
            the digest of the space: change it where the meaning of `holds` changes.
        holds: takes the values by name; must be pure.
    """

    reason: str
    holds: Callable[[Mapping[str, Value]], bool]


@dataclass(frozen=True)
class Space:
    """Parameters, and constraints between them. Without parameters it has the one empty config.

    Attributes:
        parameters: in the order that is the canonical one.
        constraints: asked in this order; the first that fails is the reason.

    Raises:
        UsageError: a name twice, or a `when` that names no earlier parameter or a value that it
            cannot have.
    """

    parameters: tuple[Parameter, ...]
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        _ = self._product  # to refuse now, not on first use, what makes no sense

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def size(self) -> int:
        """The number of configs that the parameters and their conditions give, valid or not."""
        return self._product.size

    def configs(self) -> Iterator[Config]:
        """The valid configs, in canonical order."""
        return (Config(tuple(v.items())) for v in self._product if self._failed(v) is None)

    def count(self) -> int:
        """The number of valid configs; the first call walks through the whole space."""
        return self._count

    def contains(self, config: Config) -> bool:
        """Whether the config is a valid one of this space."""
        return self.why_not(config) is None

    def why_not(self, config: Config) -> str | None:
        """The first reason why a config is not valid; None: it is."""
        return self._misfit(config) or self._failed(config.as_dict())

    def index(self, config: Config) -> int:
        """The place of a config in canonical order, from 0, counted as `size` counts.

        Constraints leave gaps and never change the order, so a config that fails one has a place
        too, and nothing needs to be enumerated.

        Raises:
            UsageError: the parameters and their conditions do not give the config.
        """
        self._refuse_misfit(config)
        return self._product.place(config.as_dict())

    def suggest(self, trial: BaseTrial) -> Config:
        """The config of a trial of Optuna: one parameter there for each that applies here.

        It may fail a constraint: ask `why_not`, and prune.

        Raises:
            UsageError: the trial has a value, enqueued by someone, that is no option.
        """
        return self._built(lambda parameter: parameter.from_param(parameter.suggest(trial)))

    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna draws each parameter from, also those that do not apply everywhere."""
        return {parameter.name: parameter.distribution() for parameter in self.parameters}

    def to_params(self, config: Config) -> dict[str, Value]:
        """The parameters of Optuna for a config, as `enqueue_trial` takes them.

        Raises:
            UsageError: the parameters and their conditions do not give the config.
        """
        self._refuse_misfit(config)
        values = config.as_dict()
        applying = (parameter for parameter in self.parameters if applies(parameter, values))
        return {p.name: p.to_param(values[p.name]) for p in applying}

    def from_params(self, params: Mapping[str, Any]) -> Config:
        """The config of the parameters of a trial. Those that do not apply are not looked at.

        Raises:
            UsageError: a parameter that applies is missing or stands for no option, or one is
                unknown.
        """
        if unknown := sorted(set(params) - set(self.names)):
            raise misuse(unknown[0], f"one of {', '.join(self.names)}", unknown[0])

        def read(parameter: Parameter) -> Value:
            if parameter.name not in params:
                raise misuse(parameter.name, "a value", "none in the trial")
            return parameter.from_param(params[parameter.name])

        return self._built(read)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the parameters as declared and the reasons of the constraints."""
        declared = {
            "parameters": [parameter.declared() for parameter in self.parameters],
            "constraints": [constraint.reason for constraint in self.constraints],
        }
        return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()

    def coverage(self, configs: Iterable[Config]) -> Coverage:
        """How much of the space these configs are; those that are not valid do not count."""
        tried = [config for config in set(configs) if self.contains(config)]
        by_parameter = []
        for p in self.parameters:
            values = list(p.options())
            if p.when is not None and p.position(p.otherwise) is None:
                values.append(p.otherwise)
            counts = ((v, sum(same(c[p.name], v) for c in tried)) for v in values)
            by_parameter.append((p.name, tuple(counts)))
        return Coverage(len(tried), self.count(), tuple(by_parameter))

    @cached_property
    def _product(self) -> Product:
        return Product(self.parameters)

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self.configs())

    def _built(self, read: Callable[[Parameter], Value]) -> Config:
        return Config(tuple(self._product.built(read).items()))

    def _misfit(self, config: Config) -> str | None:
        names = tuple(name for name, _ in config.values)
        if names != self.names:
            return f"its names are {', '.join(names) or 'none'}, in this order"
        return self._product.misfit(config.as_dict())

    def _refuse_misfit(self, config: Config) -> None:
        if (reason := self._misfit(config)) is not None:
            raise UsageError(
                f"config {config}",
                expected=f"a config of the parameters {', '.join(self.names) or 'none'}",
                found=reason,
                remedy="Take configs from configs(), suggest() or from_params().",
            )

    def _failed(self, values: Mapping[str, Value]) -> str | None:
        return next((c.reason for c in self.constraints if not c.holds(values)), None)
