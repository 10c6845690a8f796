"""What a product with quantized weights is asked for, and how its kernels are cut by default.

A cut is chosen by counting bytes. The plain kernels (linear_tiles.py) have 4 to 16 KB of weights a
program and step on their way, which was measured to be enough; 8-bit codes have a half of the
bytes a column, and 4-bit ones a quarter, so that they get more columns, or rows, a step. Decoding
costs registers too, 4 bytes a code for a while, which bounds the tile from above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ....ir.build import input_node, make
from ....ir.dtypes import DType
from ....ir.graph import Graph
from ....ir.node import Node
from ....ir.ops.control import body_of
from ....targets import Target
from ..layout import Layout, dense, is_dense
from ..source import has_e4m3
from .linear_tiles import (
    _BUCKETS,
    _FEW,
    _ROWS,
    Cutting,
    GemmTiles,
    GemvTiles,
    Problem,
    _power,
    are_taken,
)

_CODES = (DType.U8, DType.I8, DType.F8E4M3)
_LOADED = 16  # bytes that a thread loads at once


@dataclass(frozen=True, slots=True)
class Quantized:
    """A ``fused`` node of kind "linear" whose weight is ``dequantize`` of inputs of the body.

    Attributes:
        node: the call.
        problem: the product as the plain kernels see it: over a body with one more input, in the
            type of the dequantized weight and in its place. All others have the same positions.
        codes, scale, zero: inputs of the body; zero may be None.
        rows, group: how many rows and columns share a scale, 0 for all.
    """

    node: Node
    problem: Problem
    codes: Node
    scale: Node
    zero: Node | None
    rows: int
    group: int

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Quantized | None:
        """The problem of a node, None where the kernels do not take it."""
        weight = dequantized_in(node)
        if weight is None:
            return None
        body = body_of(node)
        known = dict(zip(body.inputs, layouts, strict=True))
        for part in weight.operands:
            layout = known.get(part)
            if layout is None or not is_dense(layout, part.shape):
                return None
        if weight.operands[0].dtype not in _CODES:
            return None
        plain = with_weight(node, weight, input_node("weight", weight.type))
        problem = Problem.of(plain, (*layouts, dense(weight.shape)))
        rows, group = (weight.attr(name) for name in ("rows", "group"))
        assert isinstance(rows, int) and isinstance(group, int)
        codes, scale = weight.operands[:2]
        zero = weight.args[2]
        if problem is None:
            return None
        return cls(node, problem, codes, scale, zero, rows, group)

    @property
    def parts(self) -> tuple[Node, ...]:
        """The inputs of the body that the weight consists of."""
        return tuple(part for part in (self.codes, self.scale, self.zero) if part is not None)

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 2 if self.codes.dtype is DType.U8 else 1

    @property
    def width(self) -> int:
        """Bytes of a row of codes."""
        return int(str(self.codes.shape[1]))

    @property
    def shared(self) -> int:
        """A power of two: so many columns, counted from the first one, are always of one group."""
        return self.group & -self.group if self.group else _power(self.problem.k)

    def fits(self, target: Target) -> bool:
        """Whether a target's compiler has the codes' type."""
        return self.codes.dtype is not DType.F8E4M3 or has_e4m3(target)


def dequantized_in(node: Node) -> Node | None:
    """The weight of a fused product, within its body, where it dequantizes inputs of the body; None
    for other nodes.
    """
    if node.op != "fused" or node.attr("kind") != "linear":
        return None
    body = body_of(node)
    products = [inner for inner in body.nodes if inner.op == "linear"]
    if len(products) != 1 or products[0].operands[1].op != "dequantize":
        return None
    weight = products[0].operands[1]
    plain = all(part in body.inputs for part in weight.operands)
    return weight if plain and body.users[weight] == (products[0],) else None


def with_weight(node: Node, dequantized: Node, outer: Node) -> Node:
    """The call over one more operand, ``outer``, which the product takes for its weight."""
    body = body_of(node)
    taken = {str(inner.attr("name")) for inner in body.inputs}
    name = next(n for i in range(len(taken) + 1) if (n := f"dequantized_{i}") not in taken)
    weight = input_node(name, dequantized.type)
    values = {dequantized: weight}
    for inner in body.nodes:
        if inner not in values:
            args = [None if arg is None else values[arg] for arg in inner.args]
            values[inner] = (
                inner if inner.op == "input" else make(inner.op, *args, **dict(inner.attrs))
            )
    outputs = tuple(values[output] for output in body.outputs)
    plain = Graph(body.name, (*body.inputs, weight), outputs)
    return make("fused", *node.operands, outer, body=plain, kind="linear")


def cut_gemv(node: Node, quantized: Quantized, target: Target, cutting: Cutting) -> GemvTiles:
    """The tiles for one token that a tuner chose for a call, else the default."""
    chosen = None if cutting.chosen is None else cutting.chosen.gemv(node)
    return chosen or default_quant_gemv(quantized, target)


def default_quant_gemv(quantized: Quantized, target: Target) -> GemvTiles:
    """For one token: 4 rows, of each 1 KB a step (2 KB of long rows of 8 bits), which is the 4 to
    8 KB of the plain kernel; of 4 bits 8 rows, which share the work on x. A thread loads 32 or 64
    bytes: with more codes overflow its registers.
    """
    p = quantized.problem
    longest = 2048 if p.k > 8192 or quantized.per_byte == 2 else 1024
    block_k = min(longest, max(_power(p.k), 64))
    warps = max(1, block_k // quantized.per_byte // 256)
    return GemvTiles(min(4 * quantized.per_byte // p.parts, _power(p.n)), block_k, warps)


def default_quant_gemms(
    quantized: Quantized, target: Target, cutting: Cutting
) -> list[GemmTiles] | None:
    """For several tokens, the last ones for any number; None where there are none."""
    return cut_gemms(quantized.node, quantized.problem, partial(_gemm, quantized, target), cutting)


def cut_gemms(
    node: Node, problem: Problem, default: Callable[[int], GemmTiles | None], cutting: Cutting
) -> list[GemmTiles] | None:
    """The tiles for several tokens that a tuner chose for a call, else those of ``default``, which
    is given the tokens of a tile; the last ones are for any number. None where there are none.
    """
    most, chosen = cutting.most, cutting.chosen
    sizes = [m for m in _BUCKETS if most is None or m // 2 < most or m == _BUCKETS[0]]
    found = [(chosen and chosen.gemm(node, size)) or default(size) for size in sizes]
    gemms = [tiles for tiles in found if tiles is not None]
    complete = len(gemms) == len(found) and are_taken(problem, gemms)
    return gemms if complete else None


def invariant_quant_gemm(quantized: Quantized, target: Target) -> GemmTiles | None:
    """For any number of tokens the same, in one part; None where none fit the target."""
    tiles = _gemm(quantized, target, 64)
    return tiles and replace(tiles, splits=1, ahead=0)


def _gemm(quantized: Quantized, target: Target, block_m: int) -> GemmTiles | None:
    """A tile of 64 rows, what one instruction takes from the left, and of many tokens of 128, which
    share what becomes of x. Decoding takes its time, so that products with few programs share their
    rows among several sooner than the plain ones do (measured on an H100: bench_quant_linear.py).
    """
    p = quantized.problem
    programs = p.n * p.parts / _ROWS / target.sms
    if p.linear.dtype is DType.F32:
        wanted = [(16, 32, 4, stages, 1) for stages in (3, 2, 1)]
    else:
        many = block_m == _BUCKETS[-1]
        splits = 1 if programs > 2 else 4 if programs < _FEW or not many else 2
        wanted = [(_ROWS * (1 + many), 128, 4 * (1 + many), stages, splits) for stages in (4, 3, 2)]
        wanted += [(_ROWS, 128, 4, 2, 1), (16, 64, 4, 2, 1), (16, 32, 4, 1, 1)]
    for rows, block_k, warps, stages, parts in wanted:
        columns = min(block_k, max(16 * quantized.per_byte, _power(p.k)))
        tiles = GemmTiles(block_m, max(1, rows // p.parts), columns, warps, stages, parts)
        if quant_shared_bytes(quantized, tiles) > target.shared_memory_per_block:
            continue
        if tiles.has_work(p.k):
            return tiles
    return None


def quant_shared_bytes(quantized: Quantized, tiles: GemmTiles) -> int:
    """Shared memory of a block, an upper bound: codes and tokens in flight, one decoded tile, one
    result.
    """
    p = quantized.problem
    rows, size = tiles.block_n * p.parts, p.linear.dtype.bytes
    column = rows // quantized.per_byte + tiles.block_m * size
    in_flight = tiles.num_stages * tiles.block_k * column
    return in_flight + rows * tiles.block_k * size + 4 * rows * tiles.block_m + (1 << 10)
