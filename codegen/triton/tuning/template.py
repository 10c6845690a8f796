"""What a kernel template tells the tuner: its space, its default, what a config does and costs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import ModuleType

import torch

from ....autotune.ast_hash import normalised_ast_hash
from ....autotune.prior import Constants, Work, predict
from ....autotune.space import Choice, Config, Constraint, PowerOfTwo, Space, Value
from ....ir.dims import evaluate
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ...program import Program
from ..source import KernelSource
from .problem import bases_of

Sizes = Mapping[str, int]
"""Values of the symbols in a call's types."""

Facts = tuple[tuple[str, str | int], ...]
"""A problem in words and numbers, for the key of a tuning record."""

Contents = Mapping[Node, Callable[[Sequence[int]], torch.Tensor]]

Calls = tuple[Program, tuple[KernelSource, ...]]
"""A problem computed in several calls, or in one of a library, and the sources of its kernels."""


class Template(ABC):
    """A family of kernels for one kind of call. Stateless: one instance of each.

    Attributes:
        name: in keys, and on the command line.
        modules: whose code makes the kernel: other code, another key.
        constants: of the prior, fitted to this template (benchmarks/fit_prior.py).
        copies: of the operands that calls take in turn, at least and where memory allows: what one
            seed draws must not decide.
    """

    name: str
    modules: tuple[ModuleType, ...]
    constants: Constants = Constants()
    copies: int = 1

    @cached_property
    def code_hash(self) -> str:
        """A hash of the modules' code without comments and docstrings."""
        return normalised_ast_hash("\n".join(map(inspect.getsource, self.modules)))

    @abstractmethod
    def takes(self, node: Node) -> bool:
        """Whether the template computes a call."""

    def serves(self, node: Node, target: Target) -> bool:
        """Whether it computes a call on the target; only then it has a default there."""
        return self.takes(node)

    @abstractmethod
    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """The problem: shapes, dtypes, and what stands around the work."""

    @abstractmethod
    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """The configs of a problem that could run on the target."""

    @abstractmethod
    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """What is taken without tuning; a config of the space."""

    @abstractmethod
    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel of a config, for these sizes; None where it cannot be made, and for a config
        that ``calls`` computes.
        """

    def calls(self, node: Node, config: Config, target: Target) -> Calls | None:
        """What computes a config that is no kernel of this template: calls of a library, and what
        stands around them. None for all others, and where there is no such thing.
        """
        return None

    def pinned(self, node: Node, sizes: Sizes, target: Target) -> Sequence[Config]:
        """Configs of the space that are tried whatever the prior says of them."""
        return ()

    @abstractmethod
    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """What the kernel of a config does."""

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """Seconds that a config should take."""
        return predict(self.work(node, config, sizes, target), target, self.constants)

    @abstractmethod
    def numerics(self, config: Config) -> str:
        """What decides the order of sums: configs of one class give one call's very bits."""

    def rounding(self, node: Node) -> float:
        """The error, over the largest magnitude, that a call lets its kernel have at least."""
        return 0.0

    def operands(
        self, node: Node, sizes: Sizes, device: torch.device, seed: int
    ) -> Sequence[torch.Tensor | None]:
        """Random contents of the buffers that the operands lie in: normal numbers, of booleans
        three quarters true, but for what ``contents`` knows better.
        """
        generator = torch.Generator(device).manual_seed(seed)
        special = self.contents(node, sizes, generator, seed)
        made: dict[Node, torch.Tensor] = {}
        bases = bases_of(node)
        for base in bases:
            if base is None or base in made:
                continue
            shape = [evaluate(size, sizes) for size in base.shape]
            if base in special:
                value = special[base](shape)
            else:
                value = torch.randn(shape, generator=generator, device=device)
                value = value > -0.67 if base.dtype is DType.BOOL else value
            made[base] = value.to(base.dtype.torch)
        return [None if base is None else made[base] for base in bases]

    def contents(self, node: Node, sizes: Sizes, generator: torch.Generator, seed: int) -> Contents:
        """What makes the values, by its shape, of a buffer that is not to hold normal numbers."""
        return {}


def power_range(name: str, low: int, high: int, default: int) -> PowerOfTwo:
    """A power of two from ``low`` to ``high``, or as far as the default."""
    return PowerOfTwo(name, min(low, default), max(high, default))


def with_default(name: str, values: Sequence[int], default: int) -> Choice:
    """A choice of ``values`` and the default."""
    return Choice(name, tuple(sorted({*values, default})))


def sensible(
    default: Config, reason: str, holds: Callable[[Mapping[str, Value]], bool]
) -> Constraint:
    """What a config must be to be worth its time; the default need not."""
    values = default.as_dict()
    return Constraint(reason, lambda c: holds(c) or dict(c) == values)


def int_(config: Config | Mapping[str, Value], name: str) -> int:
    """A value that is an integer."""
    value = config[name]
    assert isinstance(value, int)
    return value
