"""Runs kernel sources in tests: by Triton's interpreter on CPU tensors, or compiled for a target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.package import Resources
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.node import Node
from tilewright.ir.interpreter import bind_symbols  # noqa: F401  (used by callers)


def run_interpreted(
    source: KernelSource,
    node: Node,
    operands: Sequence[torch.Tensor | None],
    sizes: dict[str, int],
) -> tuple[torch.Tensor, ...]:
    """The results of a node by its kernel, on CPU tensors: ``operands`` are the dense base buffers."""
    return tuple(InterpretedKernel.of(source, node)(operands, sizes))


def compile_for(source: KernelSource, arch: int) -> list[Resources]:
    """Registers, spills and shared memory of each launch of a source, compiled for ``sm_<arch>``."""
    (package,) = compile_sources([source], arch)
    return [resources for resources in package.resources]
