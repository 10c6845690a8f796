"""The kernel of a model's shape as a ``KernelSource``, which is compiled as all kernels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.dtypes import DType
from ..triton.aot import compile_sources
from ..triton.package import Binary
from ..triton.source import Argument, KernelSource, Launch, Pointer, Scalar, Variant
from .generate import PARAMETERS, TIMED, constexprs, kernel_text
from .reading import Shape
from .ring import ring_of
from .ring_source import RingCut, ring_source
from .table import num_items
from .tiling import Tiling

_TYPES = {"i64": DType.I64, "i32": DType.I32, "f32": DType.F32}
NAME = "decode"
"""Of the kernel."""


def source_of(shape: Shape, cut: Tiling | RingCut, device: bool = True) -> KernelSource:
    """The kernel of a cut; without a ``device`` one for the interpreter.

    Raises:
        UnsupportedError: a ring of what does not fit one.
    """
    if isinstance(cut, RingCut):
        return ring_source(ring_of(shape), cut)
    return persistent_source(shape, cut, device=device)


def persistent_source(
    shape: Shape, tiling: Tiling, timed: bool = False, device: bool = True
) -> KernelSource:
    """The kernel; ``timed`` notes times, and without a ``device`` it is one for the interpreter."""
    arguments: list[Argument] = [
        Pointer(name, _TYPES[type_], "operand", index)
        for index, (name, type_) in enumerate(PARAMETERS.items())
        if timed or name not in TIMED
    ]
    arguments += [Scalar("pages", 0), Scalar("limit", 0)]
    constants = {**constexprs(shape, tiling, device), "ITEMS": num_items(shape, tiling)}
    launch = Launch(NAME, tuple(arguments), (tiling.programs, 1, 1), constants, tiling.num_warps)
    text = kernel_text(shape, tiling, timed)
    return KernelSource(NAME, "template", text, (Variant((launch,)),), contracts=True)


def compile_persistent(sources: Sequence[KernelSource], arch: int) -> list[Binary]:
    """Their machine code, for cooperative launches.

    Raises:
        UnsupportedError: as `compile_sources` has it.
    """
    packages = compile_sources(sources, arch)
    return [replace(next(iter(p.binaries.values())), cooperative=True) for p in packages]
