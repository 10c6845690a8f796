"""What a kernel is before it is compiled: its text, its arguments, its grids.

A ``KernelSource`` is what generators and templates make of a node. It is plain data: the engine
folder keeps it as ``kernel.py`` (for reading) and ``meta.json``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Literal, TypeAlias

from ...ir.dims import Size
from ...ir.dtypes import DType
from ...ir.node import Node
from ...targets import Target
from .layout import Layout

Kind: TypeAlias = Literal["generated", "template"]
Role: TypeAlias = Literal["operand", "result", "workspace", "counter"]
Constexpr: TypeAlias = int | float | bool | str

PDL = "PDL"
E4M3 = 89  # the first architecture that converts to and from 8-bit floats
EARLY_START = 90  # the first architecture that has programmatic dependent launch
START_EARLY = (
    f"if {PDL}:",
    "    tl.extra.cuda.gdc_launch_dependents()",
    "    tl.extra.cuda.gdc_wait()",
)
"""First lines of a kernel that has nothing to do before it waits (see `Launch`)."""
HEADER = "import triton\nimport triton.language as tl\n"
TRITON_TYPES: Mapping[DType, str] = {
    DType.F64: "fp64",
    DType.F32: "fp32",
    DType.F16: "fp16",
    DType.BF16: "bf16",
    DType.F8E4M3: "fp8e4nv",
    DType.F8E5M2: "fp8e5",
    DType.I64: "i64",
    DType.I32: "i32",
    DType.I16: "i16",
    DType.I8: "i8",
    DType.U8: "u8",
    DType.BOOL: "i1",
}
"""How a Triton signature names an element type; the others have no kernels."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """An argument that points to the start of a buffer, 16-byte aligned.

    Attributes:
        name: of the kernel's parameter.
        dtype: element type of the buffer.
        role, index: whose buffer: operand or result ``index`` of the call, a workspace, or the
            call's counters.
    """

    name: str
    dtype: DType
    role: Role
    index: int


@dataclass(frozen=True, slots=True)
class Described(Pointer):
    """A tensor map of a buffer, taken by value (tensor_map.py): a Gluon kernel has it as a tensor
    descriptor for TMA.

    Attributes:
        offset: of the first element, in elements.
        shape, strides: expressions over the Program's symbols, in elements; the last stride is 1.
        box: elements of a copy, along each dimension.
        swizzle: bytes of the lines that copies lie in, swizzled: 128, or 0 where they lie as they
            come.
    """

    offset: Size
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    box: tuple[int, ...]
    swizzle: int = 128


@dataclass(frozen=True, slots=True)
class Scalar:
    """An argument of type i32 (or i64) whose value is a size.

    Attributes:
        name: of the kernel's parameter.
        value: an expression over the Program's symbols.
        type: "i32" or "i64".
    """

    name: str
    value: Size
    type: Literal["i32", "i64"] = "i32"


Argument: TypeAlias = Pointer | Scalar


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        function: the ``@triton.jit`` function in the source.
        arguments: its run-time parameters, in order; its constexpr parameters stand behind them.
        constexprs: value of each constexpr parameter.
        grid: number of programs along each axis; a launch of none is left out.
        num_warps, num_stages: as Triton takes them.

    A kernel with a constexpr PDL uses programmatic dependent launch where it is true: it may start
    while the launch before it still runs. So it waits (``gdc_wait``) before it touches anything
    that is not a weight, in every program and on every path, and tells the launch behind it that it
    may start (``gdc_launch_dependents``). Since everyone waits, who has waited may rely on all
    launches before it. Triton's interpreter runs it without.
    """

    function: str
    arguments: tuple[Argument, ...]
    grid: tuple[Size, Size, Size]
    constexprs: Mapping[str, Constexpr] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    @property
    def pdl(self) -> bool:
        """Whether it may start before the launch before it has ended."""
        return self.constexprs.get(PDL) is True


@dataclass(frozen=True, slots=True)
class Variant:
    """Launches that compute the call, where all of ``guard`` are at least 0.

    Attributes:
        launches: in order, on one stream.
        workspaces: (element type, number of elements) of memory that lives during the call.
        guard: expressions over the Program's symbols.
        counters: number of i32 that belong to the call, and that are 0 before each run of it: its
            launches leave them so.
    """

    launches: tuple[Launch, ...]
    workspaces: tuple[tuple[DType, Size], ...] = ()
    guard: tuple[Size, ...] = ()
    counters: Size = 0


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A kernel that is not compiled yet.

    Attributes:
        name: what it does: ``add_rms_norm``.
        kind: "generated" from a fused group, or a "template" written by hand.
        text: Python: ``HEADER`` and every function that its launches need, nothing else.
        variants: tried in order; the last one has no guard.
        contracts: whether the compiler may make one rounding of a product and a sum. Not where each
            value has to be rounded as the graph declares it.
    """

    name: str
    kind: Kind
    text: str
    variants: tuple[Variant, ...]
    contracts: bool = False

    @property
    def digest(self) -> str:
        """A hash of all that makes the kernel: text, arguments, constants, grids, contraction."""
        return hashlib.sha256(repr((self.text, self.variants, self.contracts)).encode()).hexdigest()


Emit: TypeAlias = Callable[[Node, tuple[Layout | None, ...], Target], KernelSource | None]
"""(node, where each operand lies in its buffer, target) → a kernel, None where it takes no such
node. Results are dense buffers, or the operand's own where the op's schema has an alias.
"""


def jit_text(module: ModuleType, names: Iterable[str]) -> str:
    """The text of ``@triton.jit`` or ``@gluon.jit`` functions of a module, in the module's order,
    to stand in a kernel's source. Names of functions that they call must be given too.
    """
    wanted, functions = set(names), _functions(module)
    found = [segment for name, segment in functions.items() if name in wanted]
    assert len(found) == len(wanted), f"{module.__name__} lacks one of {sorted(wanted)}"
    return "".join(f"\n\n{segment}\n" for segment in found)


@cache
def _functions(module: ModuleType) -> dict[str, str]:
    """The text of each function of a module with its decorators, in its order. Cutting them out
    costs 50 ms a module, which emitting a kernel would spend again and again.
    """
    text = inspect.getsource(module)
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: "".join(f"@{ast.unparse(one)}\n" for one in node.decorator_list)
        + (ast.get_source_segment(text, node) or "")
        for node in nodes
    }


def has_e4m3(target: Target) -> bool:
    """Whether a target's compiler converts float8 e4m3; the interpreter does."""
    return target.is_cpu or target.arch >= E4M3


def has_pdl(target: Target) -> bool:
    """Whether a target launches kernels before those that they depend on have ended."""
    return target.arch >= EARLY_START
