"""All that parameters and their conditions give, before any constraint is asked.

The canonical order is lexicographic: the first parameter declared moves slowest, and the options
of each come in their declared order. A parameter that does not apply is fixed at its `otherwise`,
so that two configs never differ by what has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .config import Value, spelled
from .parameters import Parameter, When, applies, misuse, same

Values = dict[str, Value]


class Product:
    """The product of parameters, honouring their conditions.

    Args:
        parameters: in the order that is the canonical one.

    Raises:
        UsageError: a name twice, or a `when` that names no earlier parameter or a value that it
            cannot have.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._counts: dict[tuple[Any, ...], int] = {}
        earlier: dict[str, Parameter] = {}
        for parameter in self._parameters:
            if parameter.name in earlier:
                raise misuse(parameter.name, "a name of its own", "the name twice")
            if parameter.when is not None:
                _check_when(parameter.name, parameter.when, earlier)
            earlier[parameter.name] = parameter

    @property
    def size(self) -> int:
        """The number of members; nothing is enumerated."""
        return self._completions(0, {})

    def __iter__(self) -> Iterator[Values]:
        """The members, in canonical order."""
        return self._walk(0, {})

    def place(self, values: Mapping[str, Value]) -> int:
        """The place of a member in canonical order, from 0; nothing is enumerated."""
        place, prefix = 0, dict[str, Value]()
        for depth, parameter in enumerate(self._parameters):
            name = parameter.name
            for option in _options(parameter, prefix):
                if same(option, values[name]):
                    break
                place += self._completions(depth + 1, {**prefix, name: option})
            prefix[name] = values[name]
        return place

    def built(self, read: Callable[[Parameter], Value]) -> Values:
        """The member with the value that `read` gives for each parameter that applies."""
        values: Values = {}
        for p in self._parameters:
            values[p.name] = read(p) if applies(p, values) else p.otherwise
        return values

    def misfit(self, values: Mapping[str, Value]) -> str | None:
        """Why values, which have the right names, are no member; None: they are one."""
        for p in self._parameters:
            value = values[p.name]
            if applies(p, values):
                if p.position(value) is None:
                    return f"{p.name}={spelled(value)} is not one of {p.listed()}"
            elif p.when is not None and not same(value, p.otherwise):
                fixes = f"{p.when.name}={spelled(values[p.when.name])}"
                fixed = f"{fixes} fixes it at {spelled(p.otherwise)}"
                return f"{p.name}={spelled(value)} does not apply: {fixed}"
        return None

    def _walk(self, depth: int, prefix: Values) -> Iterator[Values]:
        if depth == len(self._parameters):
            yield prefix
            return
        parameter = self._parameters[depth]
        for option in _options(parameter, prefix):
            yield from self._walk(depth + 1, {**prefix, parameter.name: option})

    def _completions(self, depth: int, prefix: Values) -> int:
        """The number of members that begin so: a matter of what later conditions ask alone."""
        if depth == len(self._parameters):
            return 1
        asked = sorted({p.when.name for p in self._parameters[depth:] if p.when} & prefix.keys())
        key = (depth, *((name, type(prefix[name]), prefix[name]) for name in asked))
        if key not in self._counts:
            self._counts[key] = self._counted(depth, prefix)
        return self._counts[key]

    def _counted(self, depth: int, prefix: Values) -> int:
        parameter, *later = self._parameters[depth:]
        options, name = _options(parameter, prefix), parameter.name
        if any(p.when is not None and p.when.name == name for p in later):
            return sum(self._completions(depth + 1, {**prefix, name: o}) for o in options)
        return len(options) * self._completions(depth + 1, prefix)


def _options(parameter: Parameter, values: Mapping[str, Value]) -> Sequence[Value]:
    return parameter.options() if applies(parameter, values) else (parameter.otherwise,)


def _check_when(name: str, when: When, earlier: Mapping[str, Parameter]) -> None:
    if when.name not in earlier:
        raise misuse(name, "a `when` that names an earlier parameter", when.name)
    if not when.values:
        raise misuse(name, "a `when` with one value at least", "none")
    asked = earlier[when.name]
    for value in when.values:
        fixed = asked.when is not None and same(asked.otherwise, value)
        if asked.position(value) is None and not fixed:
            raise misuse(name, f"a `when` with values of {when.name}", repr(value))
