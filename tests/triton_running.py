"""Runs kernel sources in tests: by Triton's interpreter on CPUs, or compiled for a target."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from tilewright.codegen.triton.aot import compile_sources, triton_version
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.package import Resources
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.node import Node


def run_interpreted(
    source: KernelSource,
    node: Node,
    operands: Sequence[torch.Tensor | None],
    sizes: dict[str, int],
) -> tuple[torch.Tensor, ...]:
    """A node's results by its kernel, on CPU tensors; ``operands`` are the dense base buffers."""
    return tuple(InterpretedKernel.of(source, node)(operands, sizes))


def compile_for(source: KernelSource, arch: int) -> list[Resources]:
    """What each launch of a source takes, compiled for ``sm_<arch>``."""
    (package,) = compile_sources([source], arch)
    return list(package.resources)


def since(release: str) -> bool:
    """Whether the Triton at hand is that release or a later one."""
    ours, theirs = (re.findall(r"\d+", version)[:2] for version in (triton_version(), release))
    return [*map(int, ours)] >= [*map(int, theirs)]


SPILLED = 256 if since("3.8") else 0
"""Bytes that a launch may spill: none by the releases that kernels are cut for. Later ones give
registers out otherwise: 8 to 204 bytes in four kernels that spill none by the others.
"""
