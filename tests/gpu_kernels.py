"""Runs kernel sources on a GPU in tests: compiled all at once, launched over poisoned memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar
from unittest import mock

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.invocation import Given
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.source import KernelSource, Launch
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.targets import Target
from triton_bodies import guarded, intact, poison

T = TypeVar("T")
Kernel = TypeVar("Kernel", bound=LaunchedKernel)
CUDA = torch.device("cuda", 0)
# A failure says enough as it is: to shrink it would run all kernels hundreds of times.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@cache
def here() -> Target:
    """The GPU of this machine."""
    return Target.detect()


class PoisonedKernel(LaunchedKernel):
    """A kernel whose results and workspaces are poison before it runs. Results stand between
    guards, which it has to leave as they are, and counters at 0.
    """

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        with mock.patch.object(torch, "empty", _poisoned):
            results = super().__call__(operands, sizes)
        fresh = [r for i, r in enumerate(results) if i not in self.aliases]
        assert all(map(intact, fresh)), f"{self.source.name} writes outside of its results"
        assert not any(int(c.count_nonzero()) for c in self._counters), self.source.name
        return results

    def _result(
        self, index: int, shape: tuple[int, ...], operands: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        if index in self.aliases:
            return super()._result(index, shape, operands)
        return guarded(shape, self.result_types[index].dtype.torch, self.device)


class SteppedKernel(LaunchedKernel):
    """A kernel each of whose launches ends before the next begins."""

    def launch(
        self,
        launch: Launch,
        grid: tuple[int, int, int],
        arguments: Sequence[Given],
    ) -> None:
        super().launch(launch, grid, arguments)
        torch.cuda.synchronize()


def _poisoned(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return poison(size, dtype, device)


def loaded(
    calls: Sequence[tuple[KernelSource, Node]], *kinds: type[Kernel]
) -> list[tuple[Kernel, ...]]:
    """Of each source, which computes the node, a kernel of each kind."""
    packages = compile_sources([source for source, _ in calls], here().arch)
    return [
        tuple(kind(package, node.types, schema(node.op).aliases, CUDA) for kind in kinds)
        for package, (_, node) in zip(packages, calls, strict=True)
    ]


def poisoned_kernels(calls: Sequence[tuple[KernelSource, Node]]) -> list[PoisonedKernel]:
    """A `PoisonedKernel` of each source, which computes the node."""
    return [kernel for (kernel,) in loaded(calls, PoisonedKernel)]


def examples(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """So many examples of a strategy, the same in each run: what is compiled before any is run."""
    found: list[T] = []

    @settings(max_examples=count, phases=[Phase.generate], database=None)
    @given(strategy)
    def collect(example: T) -> None:
        found.append(example)

    collect()
    return found


def on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy on the GPU, between guards."""
    if tensor is None:
        return None
    return guarded(tensor.shape, tensor.dtype, CUDA).copy_(tensor)
