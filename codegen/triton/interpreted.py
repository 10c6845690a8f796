"""Kernels run on a CPU by Triton's interpreter: for tests, and to check a Program without a GPU.

The interpreter has to be switched on (``TRITON_INTERPRET=1``) before a process imports Triton.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ...errors import UnsupportedError
from ...ir.node import Node
from ...ir.schema import schema
from ...ir.types import TensorType
from .compat import interpret_programs, repair_interpreter
from .invocation import Given, Invocation
from .loading import module_of
from .source import PDL, KernelSource, Launch, Variant

SWITCH = "TRITON_INTERPRET"


class InterpretedKernel(Invocation):
    """One call's kernel on CPU tensors. The interpreter knows no Gluon: variants with functions in
    that are left out.

    Raises:
        UnsupportedError: the interpreter is not switched on in this process, or no variant is left.
    """

    def __init__(
        self,
        source: KernelSource,
        results: Sequence[TensorType],
        aliases: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        super().__init__(_without_gluon(source), results, aliases, device)

    @classmethod
    def of(cls, source: KernelSource, node: Node) -> InterpretedKernel:
        """The kernel of a node, for tests."""
        return cls(source, node.types, schema(node.op).aliases, torch.device("cpu"))

    def launch(
        self,
        launch: Launch,
        grid: tuple[int, int, int],
        arguments: Sequence[Given],
    ) -> None:
        function = getattr(module_in_interpreter(self.source.text), launch.function)
        constexprs = dict(launch.constexprs)
        if launch.pdl:
            constexprs[PDL] = False
        interpret_programs(function, grid, self.programs(launch, grid), arguments, constexprs)

    def programs(
        self, launch: Launch, grid: tuple[int, int, int]
    ) -> Iterable[tuple[int, int, int]]:
        """Which of a launch's programs are run: all of them."""
        x, y, z = grid
        return ((i, j, k) for i in range(x) for j in range(y) for k in range(z))


def _without_gluon(source: KernelSource) -> KernelSource:
    def known(variant: Variant) -> bool:
        heads = (f"@gluon.jit\ndef {launch.function}(" for launch in variant.launches)
        return not any(head in source.text for head in heads)

    left = tuple(filter(known, source.variants))
    if not left or left[-1].guard:
        raise UnsupportedError(
            f"kernel {source.name} on a CPU",
            expected="a variant in Triton for all sizes",
            found="one in Gluon, which Triton's interpreter does not know",
            remedy="Emit it for another architecture, or for any size of pages.",
        )
    return source if len(left) == len(source.variants) else replace(source, variants=left)


def can_interpret() -> bool:
    """Whether this process can run kernels in the interpreter."""
    return os.environ.get(SWITCH) == "1"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tilewright-")  # removed when the process ends


@cache
def module_in_interpreter(text: str) -> ModuleType:
    """The module of a kernel's text; UnsupportedError where the interpreter is not switched on."""
    if not can_interpret():
        raise UnsupportedError(
            "a Triton kernel on a CPU",
            expected=f"{SWITCH}=1 in the environment before triton is imported",
            found=f"{SWITCH}={os.environ.get(SWITCH, '')!r}",
            remedy=f"Start Python with {SWITCH}=1.",
        )
    repair_interpreter()
    return module_of(text, Path(_folder().name))
