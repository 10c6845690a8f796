"""Products of many tokens whose two halves of columns meet behind them: a gated MLP's first one.

The halves are two products of the same rows. A tile [tokens, columns] of the result needs the same
columns of both, so the weight [2 N, K] is read as [2, N, K]: a tile of it holds both, lies in
shared memory as one operand of the tensor cores, and the halves of their sum are taken apart in
registers. So what lies between, twice as wide as the result, is never written: 0.12 of 1.5 ms for
4096 tokens of Llama-3-8B, which a library's product and a kernel behind it take.

Tiles come by tensor descriptors (TMA), and are handed out to as many programs as there are
multiprocessors, in groups that share what lies in the L2 cache (Triton's persistent matmul has this
shape). Measured on an H100 a plain product of this form takes 0.96 to 1.00 times cuBLAS's time for
28672 columns of 4096 (benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.printer import value_names
from ....targets import Target
from ..generate_ops import TRITON_NAMES, elementwise, operand, rounded
from ..generate_text import helper_text, kernel_text
from ..source import HEADER, Constexpr, KernelSource, Launch, Pointer, Scalar, Variant
from .linear_tiles import Problem

FEWEST = 512
"""Tokens from which the kernel is chosen: fewer leave multiprocessors without a tile."""
_ARCHITECTURES = (90,)  # where it was measured
_ALIGNMENT = 16  # bytes between rows, for a descriptor
_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "PROGRAMS")


@dataclass(frozen=True, slots=True)
class WideTiles:
    """How the kernel is cut.

    Attributes:
        block_m, block_n: tokens and columns of a tile of the result; block_k: of a step.
        group: tiles of tokens that are computed with the same columns in turn.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3


def takes_wide(problem: Problem, target: Target) -> bool:
    """Whether the kernel takes a product on a target: of halves in 16 bits, with nothing before it
    and nothing read behind it, whose rows lie as descriptors want them.
    """
    row, offset, size = problem.x.row, problem.x.offset, problem.linear.dtype.bytes
    aligned = isinstance(row, int) and row * size % _ALIGNMENT == 0 and offset == 0
    aligned = aligned and problem.k * size % _ALIGNMENT == 0 and problem.n * size % _ALIGNMENT == 0
    alone = problem.norm is None and problem.bias is None and not problem.places
    halves = problem.parts == 2 and problem.linear.dtype in (DType.F16, DType.BF16)
    known = all(elementwise(m, ["x"] * len(m.args)) is not None for m in problem.members)
    return target.arch in _ARCHITECTURES and aligned and alone and halves and known


def fills(problem: Problem, target: Target) -> bool:
    """Whether ``FEWEST`` tokens give every multiprocessor a tile: products of fewer columns stay
    the library's.
    """
    tiles = WideTiles()
    return FEWEST // tiles.block_m * -(-problem.n // tiles.block_n) >= target.sms


def wide_source(problem: Problem, programs: int, tiles: WideTiles | None = None) -> KernelSource:
    """The kernel of a product that ``takes_wide`` takes.

    Args:
        problem: the product.
        programs: that run at once, one a multiprocessor.
        tiles: None for the default.
    """
    tiles = tiles or WideTiles()
    names = {node: f"{name}_" for node, name in value_names(problem.body).items()}
    x, weight = (f"{names[node]}ptr" for node in (problem.x.source, problem.weight))
    places = {node: index for index, node in enumerate(problem.body.inputs)}
    arguments = (
        Pointer(x, problem.linear.dtype, "operand", places[problem.x.source]),
        Pointer(weight, problem.linear.dtype, "operand", places[problem.weight]),
        Pointer("out_ptr", problem.node.dtype, "result", 0),
        Scalar("tokens", problem.tokens),
    )
    behind = _behind(problem, names)
    lines = [*_descriptors(problem, x, weight), *_LOOP, *(f"    {line}" for line in behind)]
    values = (tiles.block_m, tiles.block_n, tiles.block_k, tiles.group, programs)
    constants: dict[str, Constexpr] = dict(zip(_CONSTANTS, values, strict=True))
    name = f"{problem.body.name}_wide"
    launch = Launch(name, arguments, (programs, 1, 1), constants, tiles.num_warps, tiles.num_stages)
    text = HEADER + helper_text(lines)
    passed = [argument.name for argument in arguments]
    text += kernel_text(name, str(problem.body), passed, lines, _CONSTANTS)
    return KernelSource(problem.body.name, "template", text, (Variant((launch,)),))


def _descriptors(problem: Problem, x: str, weight: str) -> list[str]:
    n, k, row = problem.n, problem.k, problem.x.row
    return [
        f"x = tl.make_tensor_descriptor({x}, [tokens, {k}], [{row}, 1], [BLOCK_M, BLOCK_K])",
        f"weight = tl.make_tensor_descriptor({weight}, [2, {n}, {k}], [{n * k}, {k}, 1], "
        "[2, BLOCK_N, BLOCK_K])",
        f"out = tl.make_tensor_descriptor(out_ptr, [tokens, {n}], [{n}, 1], [BLOCK_M, BLOCK_N])",
        f"COLUMNS: tl.constexpr = ({n} + BLOCK_N - 1) // BLOCK_N",
        f"STEPS: tl.constexpr = ({k} + BLOCK_K - 1) // BLOCK_K",
    ]


_LOOP = (
    "blocks = tl.cdiv(tokens, BLOCK_M)",
    "for tile in tl.range(tl.program_id(0), blocks * COLUMNS, PROGRAMS, flatten=True):",
    "    first_block = tile // (GROUP * COLUMNS) * GROUP",
    "    size = tl.minimum(blocks - first_block, GROUP)",
    "    place = tile % (GROUP * COLUMNS)",
    "    token = (first_block + place % size) * BLOCK_M",
    "    column = place // size * BLOCK_N",
    "    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)",
    "    for step in range(STEPS):",
    "        rows = x.load([token, step * BLOCK_K])",
    "        both = tl.reshape(weight.load([0, column, step * BLOCK_K]), (2 * BLOCK_N, BLOCK_K))",
    "        acc = tl.dot(rows, tl.trans(both), acc)",
)
"""Up to ``acc``, the product f32 [tokens, columns of the first half and then of the second]."""


def _behind(problem: Problem, names: Mapping[Node, str]) -> list[str]:
    """From ``acc`` to the store: the body's ops, each in its element type."""
    lines = [
        f"acc = {rounded('acc', problem.linear.dtype)}",
        "halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))",
        "first, second = tl.split(halves)",
    ]
    known = {member: names[member] for member in problem.members}
    result = "first"
    for member in problem.members:
        texts = []
        for arg in member.operands:
            if arg.op == "const":
                texts.append(operand(member, arg))
            elif arg.op == "slice":
                texts.append("first" if arg.attr("start") == 0 else "second")
            else:
                texts.append(known[arg])
        text = elementwise(member, texts)
        assert text is not None
        result = known[member]
        lines.append(f"{result} = {text}")
    lines.append(f"out.store([token, column], {result}.to({TRITON_NAMES[problem.node.dtype]}))")
    return lines
