"""Runs the steps of an ONNX graph as an nn.Module."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import CaptureError, TilewrightError, UnsupportedError
from ...formats.weights import Held, Weight
from .call import Call
from .model import Model, Step
from .rules.known import KNOWN
from .rules.table import RULES
from .values import Value, known_tensor, tensor_of
from .weights import is_constant


class Steps(nn.Module):
    """The steps that some outputs need; holds the weights under the file's names.

    Weights that are expressions over codes are NaN here: they are for capture alone.

    Args:
        model: what a file says.
        outputs: the wanted ones.
    """

    def __init__(self, model: Model, outputs: Sequence[str]) -> None:
        super().__init__()
        self.steps = _needed(model.steps, outputs)
        self.makers = {name: step for step in self.steps for name in step.outputs if name}
        self.constants = {name: known_tensor(t) for name, t in model.constants.items()}
        read = {name for step in self.steps for name in step.inputs} | set(outputs)
        self.homes = {n: self._hold(n, w) for n, w in model.weights.items() if n in read}

    def _hold(self, name: str, weight: Weight) -> str:
        """Registers a weight, the dots of its name being levels of modules; gives its full name."""
        levels = [part or "_" for part in name.split(".")]
        home: nn.Module = self
        for level in levels[:-1]:
            if not isinstance(getattr(home, level, None), nn.Module):
                level = _free(home, level)
                home.add_module(level, nn.Module())
            home = getattr(home, level)
        last = _free(home, levels[-1])
        if isinstance(weight, Held):
            tensor = weight.tensor
        else:
            tensor = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)
        if tensor.dtype.is_floating_point:
            home.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        else:
            home.register_buffer(last, tensor)
        found = getattr(home, last)
        return next(n for n, t in (*self.named_parameters(), *self.named_buffers()) if t is found)

    def weight_names(self) -> Mapping[str, str]:
        """By the file's name, the module's."""
        return self.homes

    def run(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """All values, from those of the inputs."""
        every: dict[str, Value] = {**self.constants, **values}
        every.update((name, self.get_weight(home)) for name, home in self.homes.items())
        for step in self.steps:
            operands = tuple(every.get(name) if name else None for name in step.inputs)
            results = _result(Call(step, operands, self.makers, every))
            named = zip(step.outputs, results, strict=False)
            every.update((name, value) for name, value in named if name and value is not None)
        return every

    def get_weight(self, home: str) -> Tensor:
        """A weight by the module's name for it."""
        path, _, last = home.rpartition(".")
        found = getattr(self.get_submodule(path), last)
        assert isinstance(found, Tensor)
        return found


def _free(home: nn.Module, name: str) -> str:
    while hasattr(home, name):
        name += "_"
    return name


def _needed(steps: Sequence[Step], outputs: Sequence[str]) -> tuple[Step, ...]:
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            kept.append(step)
            wanted.update(step.inputs)
    return tuple(kept[::-1])


def _result(c: Call) -> tuple[Value | None, ...]:
    step = c.step
    try:
        if not step.domain and step.op in KNOWN:
            found = KNOWN[step.op](c)
            if found is not None:
                return (found,)
        result = RULES[step.domain][step.op](c)
        c.check_read()
    except TilewrightError:
        raise
    except Exception as error:
        raise CaptureError(
            str(step),
            expected="operands that its op takes, of sizes that do not depend on data",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="Check the example inputs against the model, or dynamic_shapes.",
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    return tuple(_constant(step, part) for part in results)


def _constant(step: Step, value: Value | None) -> Value | None:
    """Constants as what is known, where they are small."""
    if step.op == "Constant" and isinstance(value, Tensor) and is_constant(value):
        return known_tensor(value)
    return value


class OnnxGraph(Steps):
    """A graph of named tensors: ``module(x=…)`` gives a dict of the outputs by name.

    Parameters have the file's names, made identifiers; positional arguments go in its order.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model, model.outputs)
        self.names = {parameter_name(given.name): given.name for given in model.inputs}
        if len(self.names) < len(model.inputs):
            raise UnsupportedError(
                f"inputs of {model.path}",
                expected="names that stay apart as identifiers",
                found=", ".join(given.name for given in model.inputs),
                remedy="Rename the inputs.",
            )
        self.results = model.outputs
        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.names
        ]
        self.forward = _forward(self, inspect.Signature(parameters))

    def outputs_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, from inputs by their parameter's name."""
        every = self.run({self.names[name]: value for name, value in values.items()})
        return {name: tensor_of(every[name]) for name in self.results}


def _forward(graph: OnnxGraph, signature: inspect.Signature) -> Callable[..., dict[str, Tensor]]:
    """A forward() whose signature is that of the file."""

    def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        return graph.outputs_of(signature.bind(*args, **kwargs).arguments)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def parameter_name(name: str) -> str:
    """A name of the file as a Python identifier."""
    found = re.sub(r"\W", "_", name)
    return found if found.isidentifier() else f"input_{found}"
