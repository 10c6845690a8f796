"""What a product of two operands in codes is asked for, and how its kernels are cut by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ....ir.build import make
from ....ir.dtypes import DType
from ....ir.graph import Graph
from ....ir.node import Node
from ....ir.ops.control import body_of
from ....ir.ops.quant import LARGEST
from ....targets import Target
from ..layout import Layout, is_dense
from .linear_tiles import (
    _BUCKETS,
    _FEW,
    _MANY,
    _ROWS,
    Cutting,
    GemmTiles,
    GemvTiles,
    _power,
)
from .quant_linear_tiles import Quantized, cut_gemms, default_quant_gemv

_LEAST = 32  # columns of codes that an instruction takes


@dataclass(frozen=True, slots=True)
class Scaled:
    """A ``fused`` node of kind "linear" whose product is ``scaled_linear`` over rows that the body
    itself rounds.

    Attributes:
        node: the call.
        quantized: the same product over x as it is before it is rounded: over a body with
            ``linear(x, dequantize(codes, scale))`` in the product's place, and equal inputs.
        rounds: the ``quantize_rows`` of the body.
    """

    node: Node
    quantized: Quantized
    rounds: Node

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Scaled | None:
        """The problem of a node, None where the kernels do not take it."""
        product = scaled_in(node)
        if product is None:
            return None
        rounds, body = product.operands[0].operands[0], body_of(node)
        static, known = rounds.args[1], dict(zip(body.inputs, layouts, strict=True))
        if static is not None:
            layout = known.get(static)
            if layout is None or not is_dense(layout, static.shape):
                return None
        quantized = Quantized.of(_unrounded(node, product), layouts)
        group = rounds.attr("group")
        assert isinstance(group, int)
        fits = group == 0 or (group >= _LEAST and group == _power(group))
        return cls(node, quantized, rounds) if quantized is not None and fits else None

    @property
    def static(self) -> Node | None:
        """The calibrated scale [1] of x, an input of the body."""
        return self.rounds.args[1]

    @property
    def codes(self) -> DType:
        """Of both operands."""
        return self.quantized.codes.dtype

    @property
    def largest(self) -> float:
        """The code that the largest magnitude of a group of x becomes."""
        return LARGEST[self.codes]


def scaled_in(node: Node) -> Node | None:
    """The product of a fused product within its body, where it is one of two operands in codes, of
    which the body makes the left one; None for other nodes.
    """
    if node.op != "fused" or node.attr("kind") != "linear":
        return None
    products = [inner for inner in body_of(node).nodes if inner.op == "scaled_linear"]
    if len(products) != 1:
        return None
    (product,) = products
    codes, scale = product.operands[:2]
    if codes.op != "item" or codes.operands[0].op != "quantize_rows":
        return None
    rounds = codes.operands[0]
    own = scale.op == "item" and scale.operands[0] is rounds
    return product if own or scale is rounds.args[1] else None


def _unrounded(node: Node, product: Node) -> Node:
    """The call with ``linear(x, dequantize(codes, scale))`` in the place of the product."""
    body = body_of(node)
    values: dict[Node, Node] = {}
    for inner in body.nodes:
        if inner is product:
            x = values[product.operands[0].operands[0].operands[0]]
            codes, scale = (values[part] for part in product.operands[2:4])
            attrs = {name: product.attr(name) for name in ("dtype", "rows", "group")}
            bias = product.args[4]
            weight = make("dequantize", codes, scale, None, **attrs)
            values[inner] = make("linear", x, weight, None if bias is None else values[bias])
        elif inner.op == "input":
            values[inner] = inner
        else:
            args = [None if arg is None else values[arg] for arg in inner.args]
            values[inner] = make(inner.op, *args, **dict(inner.attrs))
    outputs = tuple(values[output] for output in body.outputs)
    plain = Graph(body.name, body.inputs, outputs)
    return make("fused", *node.operands, body=plain, kind="linear")


def scaled_gemv(node: Node, scaled: Scaled, target: Target, cutting: Cutting) -> GemvTiles:
    """The tiles for one token that a tuner chose for a call, else the default."""
    chosen = None if cutting.chosen is None else cutting.chosen.gemv(node)
    return chosen or default_scaled_gemv(scaled, target)


def default_scaled_gemv(scaled: Scaled, target: Target) -> GemvTiles:
    """For one token: two rows, of each 4 KB a step. x is few bytes and nothing is left to do to it,
    so that wide steps cost nothing. Where groups of x are scaled before, as over numbers.
    """
    quantized = scaled.quantized
    if quantized.group:
        return default_quant_gemv(quantized, target)
    p = quantized.problem
    block_k = min(4096, max(_power(p.k), 64))
    warps = max(1, block_k // 1024)
    return GemvTiles(min(2 // p.parts, _power(p.n)), block_k, warps)


def default_scaled_gemms(
    scaled: Scaled, target: Target, cutting: Cutting
) -> list[GemmTiles] | None:
    """For several tokens, the last ones for any number; None where there are none."""
    return cut_gemms(scaled.node, scaled.quantized.problem, partial(_gemm, scaled, target), cutting)


def invariant_scaled_gemm(scaled: Scaled, target: Target) -> GemmTiles | None:
    """For any number of tokens the same, in one part; None where none fit the target."""
    return _gemm(scaled, target, 64, shares=False)


def _gemm(scaled: Scaled, target: Target, block_m: int, *, shares: bool = True) -> GemmTiles | None:
    """A tile of 64 rows and, of each, 256 bytes a step, which is as many bytes as the plain kernels
    have on their way. Products with few programs share their rows among several; those with many
    have twice the rows where there are many tokens (measured on an H100: bench_scaled_linear.py).
    """
    p = scaled.quantized.problem
    programs = p.n * p.parts / _ROWS / target.sms
    splits = (4 if block_m == 16 else 2) if shares and programs < _FEW else 1
    wanted = [(_ROWS, 256, 4, 4, splits)]
    if block_m >= _BUCKETS[-2]:
        wanted = [(2 * _ROWS if programs > _MANY else _ROWS, 256, 8, 3, splits)]
    wanted += [(_ROWS, 128, 4, 4, splits), (_ROWS, 128, 4, 3, 1), (_ROWS, 64, 4, 2, 1)]
    for rows, block_k, warps, stages, parts in (*wanted, (_ROWS, _LEAST, 4, 1, 1)):
        columns = min(block_k, max(_LEAST, _power(p.k)), scaled.quantized.group or block_k)
        tiles = GemmTiles(block_m, max(1, rows // p.parts), columns, warps, stages, parts)
        fits = scaled_shared_bytes(scaled, tiles) <= target.shared_memory_per_block
        if fits and tiles.has_work(p.k):
            return tiles
    return None


def scaled_shared_bytes(scaled: Scaled, tiles: GemmTiles) -> int:
    """Shared memory of a block, an upper bound: codes in flight, one result."""
    rows = tiles.block_n * scaled.quantized.problem.parts
    in_flight = tiles.num_stages * tiles.block_k * (rows + tiles.block_m)
    return in_flight + 4 * rows * tiles.block_m + (1 << 10)
