"""What experts are asked for, and how their kernels are cut: tiles, their defaults, and the numbers
of tokens that each is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ....ir.dims import Size
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..generate_ops import attr_float
from ..layout import Layout, is_dense
from .linear_tiles import FLOATS

OPERANDS = ("x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
"""Of a ``moe_experts``, in order."""

BUCKETS = (16, 32, 64, 128)
"""Pairs of a tile."""

SPACE: Mapping[str, tuple[int, ...]] = {
    "block_n": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "block_k": (32, 64, 128, 256, 512, 1024, 2048),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "group": (1, 4, 8, 16),
}
"""What may be tuned, and the values to try: the fields of `RowTiles` and `GroupTiles`."""

Product: TypeAlias = Literal["gate_up", "down"]
PRODUCTS: tuple[Product, Product] = ("gate_up", "down")


@dataclass(frozen=True, slots=True)
class RowTiles:
    """How a product of one pair, or of one token's pairs, is cut.

    Attributes:
        block_n: outputs of a program; of ``gate_up`` both a gate and an up each.
        block_k: elements of a row of weights that a step reads.
        num_warps: as Triton takes it.
    """

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class GroupTiles:
    """How a product of many pairs, in order of their experts, is cut.

    Attributes:
        block_m: pairs of a tile, all of one expert; the same in both products.
        block_n, block_k, num_warps: as of `RowTiles`.
        num_stages: as Triton takes it.
        group: tiles of an expert that go through the columns side by side, up to 16; those of
            gate_up are so in both products.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 16


Rows: TypeAlias = tuple[RowTiles, RowTiles]
Groups: TypeAlias = tuple[GroupTiles, GroupTiles]
"""The tiles of gate_up and of down, of one kind, with the same pairs a tile."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A ``moe_experts`` that the kernels take.

    Attributes:
        node: the call.
        layouts: where each operand lies; all offsets and strides are numbers.
        experts, slots, inner, width: E, k, F, K.
    """

    node: Node
    layouts: tuple[Layout | None, ...]
    experts: int
    slots: int
    inner: int
    width: int

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Problem | None:
        """The problem of a node, None where the kernels do not take it."""
        x, ids, weights, _, down = node.operands[:5]
        if node.op != "moe_experts" or ids.type.rank != 2 or x.dtype not in FLOATS:
            return None
        sizes = (down.shape[0], ids.shape[1], down.shape[2], down.shape[1])
        static = [size for size in sizes if isinstance(size, int) and size > 0]
        given = zip(node.args, layouts, strict=True)
        if len(static) < 4 or weights.dtype is DType.F64 or not all(_is_known(*g) for g in given):
            return None
        if not all(arg is None or _is_dense(arg, layouts[i]) for i, arg in _biases(node)):
            return None
        found = cls(node, tuple(layouts), *static)
        rows = found.strides(0)[1] == 1 or found.width == 1
        return found if rows and all(1 in found.strides(i)[1:] for i in (3, 4)) else None

    @property
    def tokens(self) -> Size:
        """T."""
        return self.node.shape[0]

    @property
    def pairs(self) -> Size:
        """A token and one of its slots each."""
        return self.tokens * self.slots

    @property
    def dtype(self) -> DType:
        """Of x, of the weights and of the result."""
        return self.node.dtype

    @property
    def interleaved(self) -> bool:
        """Whether gates and ups alternate."""
        return bool(self.node.attr("interleaved"))

    def number(self, name: str) -> float | None:
        """The attribute ``limit`` or ``alpha``."""
        value = self.node.attr(name)
        return None if value is None else attr_float(value)

    def strides(self, operand: int) -> tuple[int, ...]:
        """Of an operand, in elements."""
        layout = self.layouts[operand]
        assert layout is not None
        return tuple(int(str(stride)) for stride in layout.strides)

    def offset(self, operand: int) -> int:
        """Where an operand begins in its buffer, in elements."""
        layout = self.layouts[operand]
        assert layout is not None
        return int(str(layout.offset))

    @property
    def in_rows(self) -> bool:
        """Whether both weights lie in dense rows, as the kernels for few tokens want them."""
        return self.strides(3)[1:] == (self.width, 1) and self.strides(4)[1:] == (self.inner, 1)

    def sizes(self, product: Product) -> tuple[int, int]:
        """(outputs, elements of a row of weights) of a product."""
        return (self.inner, self.width) if product == "gate_up" else (self.width, self.inner)


def _is_known(arg: Node | None, layout: Layout | None) -> bool:
    """Whether an operand is missing, or lies at a place that is a number."""
    if arg is None:
        return True
    return layout is not None and all(isinstance(s, int) for s in (layout.offset, *layout.strides))


def _is_dense(arg: Node, layout: Layout | None) -> bool:
    return layout is not None and is_dense(layout, arg.shape)


def _biases(node: Node) -> list[tuple[int, Node | None]]:
    return [(index, node.args[index]) for index in (5, 6)]


def most_row_tokens(problem: Problem) -> int:
    """Tokens up to which a program for each pair reads hardly more than one for each expert would:
    their pairs are a quarter of the experts, or there is one token. 0 where there are no rows.
    """
    if not problem.in_rows:
        return 0
    return max(1, problem.experts // (4 * problem.slots))


def buckets(problem: Problem, most: int | None) -> list[tuple[int, int | None]]:
    """(pairs of a tile, tokens up to which it is taken), rising: while an expert has half a tile of
    pairs on average, for a second tile reads its weights again. The last one is for any number;
    where the number of tokens is known, there is no other.

    Args:
        problem: the experts.
        most: tokens at most, None for any number.
    """
    known = isinstance(problem.tokens, int)
    most = problem.tokens if isinstance(problem.tokens, int) else most
    sizes = BUCKETS[:-1] if problem.dtype is DType.F32 else BUCKETS
    found: list[tuple[int, int | None]] = []
    for size in sizes:
        limit = size * problem.experts // (2 * problem.slots)
        if limit < 1 and size != sizes[-1]:
            continue
        found.append((size, limit))
        if most is not None and limit >= most:
            break
    return [*([] if known else found[:-1]), (found[-1][0], None)]


def default_rows(problem: Problem, product: Product) -> RowTiles:
    """Tiles of a few KB, as of the linears for one token."""
    outputs, length = problem.sizes(product)
    long = length > 8192
    largest = 2048 if long else 1024
    divides = next((size for size in (largest, 512, 256) if length % size == 0), None)
    block_k = divides or min(largest, max(_power(length), 64))
    rows = 4 if long or product == "gate_up" else 2
    block_n = min(rows // (2 if product == "gate_up" else 1), _power(outputs))
    return RowTiles(block_n, block_k, max(1, min(8, block_k // 256)))


def default_groups(
    problem: Problem, product: Product, target: Target, block_m: int
) -> GroupTiles | None:
    """Tiles for pairs in order of their experts; None where none fit the target."""
    outputs, length = problem.sizes(product)
    if problem.dtype is DType.F32:
        wanted = GroupTiles(block_m, 16, 32, 4, 3)
    else:
        wanted = _WANTED[product, block_m]
    tiles = replace(
        wanted,
        block_n=min(wanted.block_n, max(16, _power(outputs))),
        block_k=min(wanted.block_k, max(16, _power(length))),
    )
    if 1 not in problem.strides(4 if product == "down" else 3)[2:]:
        # Rows are neighbours in memory: blocks that they fill are read in wide pieces.
        while tiles.block_n > 16 and outputs % tiles.block_n:
            tiles = replace(tiles, block_n=tiles.block_n // 2)
    while shared_bytes(problem, product, tiles) > target.shared_memory_per_block:
        if tiles.num_stages > 2:
            tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        elif tiles.block_k > 32:
            tiles = replace(tiles, block_k=tiles.block_k // 2)
        elif tiles.block_n > 16:
            tiles = replace(tiles, block_n=tiles.block_n // 2)
        else:
            return None
    return tiles


# Not measured yet: two programs a multiprocessor with 80 KB of weights each on their way where
# tiles are small, 128 sums a thread where they are large.
_WANTED: Mapping[tuple[Product, int], GroupTiles] = {
    ("gate_up", 16): GroupTiles(16, 64, 128, 4, 3),
    ("gate_up", 32): GroupTiles(32, 64, 64, 4, 4),
    ("gate_up", 64): GroupTiles(64, 64, 64, 4, 4),
    ("gate_up", 128): GroupTiles(128, 128, 64, 8, 3),
    ("down", 16): GroupTiles(16, 64, 128, 4, 4),
    ("down", 32): GroupTiles(32, 64, 128, 4, 4),
    ("down", 64): GroupTiles(64, 128, 64, 4, 4),
    ("down", 128): GroupTiles(128, 256, 64, 8, 3),
}


def invariant_groups(problem: Problem, product: Product, target: Target) -> GroupTiles | None:
    """Tiles for any number of tokens, the same for all; None where none fit the target."""
    return default_groups(problem, product, target, 32 if problem.dtype is DType.F32 else 64)


def shared_bytes(problem: Problem, product: Product, tiles: GroupTiles) -> int:
    """Shared memory of a block, an upper bound: weights and pairs on their way, or afterwards the
    sums as they change threads.
    """
    rows = tiles.block_n * (2 if product == "gate_up" else 1)
    stage = tiles.block_k * (rows + tiles.block_m) * problem.dtype.bytes
    return max(tiles.num_stages * stage, 4 * rows * tiles.block_m) + (1 << 10)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
