"""Sampling in two launches: what each chunk of each row of logits has, on the whole GPU; then a
token for each row.

A greedy row is done when the chunks' maxima are compared. So is, but for one chunk, a row that only
has a temperature: the chunks' masses lead to the one that holds its token. Min-p takes one more
pass over the row. Top-k and top-p first list the few elements that can survive (chunks and masses
give a bound), and search their cuts among those; a distribution so flat that the list does not hold
them is searched as a whole, in 8 passes over 16 bits, and 16 over 32.

Accuracy: an exponential is good to 2^-22 (1 + 2 |x|) for an exponent x, whose mean over a
distribution is below log2 V; sums are float32 within a block, float64 over blocks. So for any V up
to 2^18 what the token's interval of the distribution function, and the mass that top-p compares,
may be off by is below 1e-5 of the whole (in practice 1e-6). Top-k, min-p and ties are exact. Rows
do not depend on each other: alone or in a batch, the token is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from ....ir.dims import Size
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..layout import Layout, is_dense
from ..source import (
    HEADER,
    PDL,
    Constexpr,
    KernelSource,
    Launch,
    Pointer,
    Variant,
    has_pdl,
    jit_text,
)
from . import sample_kernel

SPACE: Mapping[str, tuple[int, ...]] = {
    "chunk": (1024, 2048, 4096),
    "block": (2048, 4096, 8192),
    "num_warps": (8, 16),
    "num_stages": (1, 2, 3, 4),
}
"""What may be tuned, and the values to try: the fields of `Tiles`. All run on every target."""

# Bits of a float32 that a wider element type would need.
_SHIFTS = {DType.F32: 0, DType.F16: 13, DType.BF16: 16}
_CAPACITY = 16384  # elements of a row's list: 96 KB for 16 bits
_LARGEST = 1 << 24  # a count up to here is exact in float32
_PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "uniform")
_CHUNK_PARTS = (
    Pointer("chunk_max", DType.F32, "workspace", 0),
    Pointer("chunk_first", DType.I32, "workspace", 1),
    Pointer("chunk_mass", DType.F32, "workspace", 2),
)
_FUNCTIONS = (
    *("_key", "_least_key", "_scale", "_chunk", "_load", "_keys", "_select", "_listed"),
    *("_masses", "_invert", "_random", "_choose"),
)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
        chunk: tokens of a program of the first launch, a power of two.
        block: tokens that a program of the second one takes at a time, a power of two.
        num_warps, num_stages: of the second launch.
    """

    chunk: int
    block: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A ``sample`` that the kernel takes.

    Attributes:
        node: the call.
        vocab: V.
        offset, stride: where row r of the logits begins, ``offset + r * stride``, in elements.
    """

    node: Node
    vocab: int
    offset: int
    stride: int

    @staticmethod
    def of(node: Node, layouts: tuple[Layout | None, ...]) -> Problem | None:
        """The problem of a node, None where the kernel does not take it."""
        logits, *given = node.operands
        place, vocab = layouts[0], logits.shape[1]
        if logits.dtype not in _SHIFTS or not isinstance(vocab, int) or vocab > _LARGEST:
            return None
        for arg, layout in zip(given, layouts[1:], strict=True):
            if layout is None or not is_dense(layout, arg.shape):
                return None
        if place is None or (place.strides[1] != 1 and vocab > 1):
            return None
        offset, stride = place.offset, place.strides[0]
        if not isinstance(offset, int) or not isinstance(stride, int):
            return None
        return Problem(node, vocab, offset, stride)

    @property
    def rows(self) -> Size:
        """R."""
        return self.node.shape[0]

    @property
    def vector(self) -> int:
        """Elements that can be loaded at once in each row."""
        return gcd(16, self.offset, self.stride, self.vocab)


def emit_sample(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """A kernel for a ``sample`` of float32, float16 or bfloat16 logits.

    None where the element type is another, V or a row's place is symbolic, V is above 2^24, a row
    does not lie in one piece, or a parameter is a strided view.
    """
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    return sample_source(problem, default_tiles(problem), has_pdl(target))


def default_tiles(problem: Problem) -> Tiles:
    """At most 128 chunks of 1024 tokens or more, and 4096 tokens a block in 16 warps; less for a
    small vocabulary.
    """
    block = min(4096, max(256, _power(problem.vocab)))
    chunk = max(min(1024, block), _power(problem.vocab) // 128)
    return Tiles(min(chunk, 4096), block, block // 256, 3)


def sample_source(problem: Problem, tiles: Tiles, pdl: bool) -> KernelSource:
    """The kernel of a problem with these tiles; ``pdl``: with programmatic dependent launch."""
    node, rows = problem.node, problem.rows
    chunks = -(-problem.vocab // tiles.chunk)
    capacity = min(_CAPACITY, -(-problem.vocab // 16) * 16)
    operands = {
        name: Pointer(name, arg.dtype, "operand", index)
        for index, (name, arg) in enumerate(
            zip(("logits", *_PARAMETERS), node.operands, strict=True)
        )
    }
    element = node.operands[0].dtype
    lists = (
        Pointer("list_logits", element, "workspace", 3),
        Pointer("list_tokens", DType.I32, "workspace", 4),
    )
    spaces = [(pointer.dtype, rows * chunks) for pointer in _CHUNK_PARTS]
    spaces += [(pointer.dtype, rows * capacity) for pointer in lists]
    first = Launch(
        "sample_chunks",
        (operands["logits"], operands["temperature"], *_CHUNK_PARTS),
        (rows, chunks, 1),
        {"CHUNK": tiles.chunk, PDL: pdl},
        min(max(tiles.chunk // 256, 1), 8),
    )
    result = Pointer("tokens", DType.I64, "result", 0)
    second = Launch(
        "sample_rows",
        (*operands.values(), result, *_CHUNK_PARTS, *lists),
        (rows, 1, 1),
        {"CHUNK": tiles.chunk, "BLOCK": tiles.block, "STAGES": tiles.num_stages, PDL: pdl},
        tiles.num_warps,
    )
    sizes: dict[str, Constexpr] = {"STRIDE": problem.stride, "V": problem.vocab, "CHUNKS": chunks}
    further: dict[str, Constexpr] = {
        "CAPACITY": capacity,
        "SHIFT": _SHIFTS[element],
        "VEC": problem.vector,
        "CHUNK_SLOTS": _power(chunks),
        "SLOTS": _power(-(-problem.vocab // tiles.block)),
    }
    texts = (
        HEADER,
        jit_text(sample_kernel, _FUNCTIONS),
        _entry(problem, first, "_chunk", sizes),
        _entry(problem, second, "_choose", sizes | further),
    )
    variant = Variant((first, second), tuple(spaces))
    return KernelSource("sample", "template", "".join(texts), (variant,))


def _entry(problem: Problem, launch: Launch, inner: str, constants: Mapping[str, Constexpr]) -> str:
    """The function of a launch: it calls ``inner`` with all sizes filled in."""
    names = [argument.name for argument in launch.arguments]
    passed = {name: name for name in (*names, *launch.constexprs)}
    passed |= {name: repr(value) for name, value in constants.items()}
    if problem.offset:
        passed["logits"] = f"logits + {problem.offset}"
    parameters = names + [f"{name}: tl.constexpr" for name in launch.constexprs]
    lines = "".join(f"        {name}={text},\n" for name, text in passed.items())
    return (
        f"\n\n@triton.jit\ndef {launch.function}({', '.join(parameters)}):\n"
        f"    # logits: {problem.node.operands[0].type}\n    {inner}(\n{lines}    )\n"
    )


def _power(size: int) -> int:
    """The least power of two that holds ``size``, and at least 2."""
    return max(2, 1 << (size - 1).bit_length())
