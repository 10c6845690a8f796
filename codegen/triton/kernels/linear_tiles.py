"""What a decode linear is asked for, and how its kernels are cut: tiles and their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ....ir.dims import Size
from ....ir.dtypes import DType
from ....ir.graph import Graph
from ....ir.node import Node
from ....ir.ops.control import body_of
from ....targets import Target
from ..generate_ops import attr_float, elementwise
from ..generate_space import BODY_VIEWS
from ..layout import Layout, is_dense, located
from .linear_views import Place, place_of

_BUCKETS = (16, 32, 64, 128)  # tokens of a program
FLOATS = (DType.F16, DType.BF16, DType.F32)

SPACE: Mapping[str, tuple[int, ...]] = {
    "block_n": (2, 4, 8, 16, 32, 64, 128),
    "block_k": (64, 128, 256, 512, 1024, 2048, 4096),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "splits": (1, 2, 3, 4, 6, 8),
    "ahead": (0, 256, 512, 1024, 2048, 4096),
}
"""What may be tuned, and the values to try: the fields of `GemvTiles` and `GemmTiles`."""


@dataclass(frozen=True, slots=True)
class GemvTiles:
    """How the kernel for one token is cut.

    Attributes:
        block_n: outputs of a program.
        block_k: elements of a row of weights that a step reads.
        num_warps: as Triton takes it.
    """

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """How the kernel for several tokens is cut.

    Attributes:
        block_m: tokens of a program; ``block_n``: its outputs; ``block_k``: of a step.
        num_warps, num_stages: as Triton takes them.
        splits: programs that share the columns of weights of a tile.
        ahead: columns of weights behind the first tile that are brought to L2 before x is waited
            for, 0 for none.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    ahead: int = 0

    def has_work(self, k: int) -> bool:
        """Whether each of the splits has columns, of ``k``."""
        tiles = -(-k // self.block_k)
        return (self.splits - 1) * -(-tiles // self.splits) < tiles


@dataclass(frozen=True, slots=True)
class Problem:
    """A ``fused`` node of kind "linear" that the kernels take.

    Attributes:
        node, body: the call and its graph.
        linear: the product within the body.
        norm: the ``rms_norm`` before it, None without.
        x: where the rows [T, K] of the left operand lie (of the norm's, if there is one).
        weight, bias: inputs of the body.
        members: what is computed from the product, in order; empty where it is the result.
        parts: 2 where the halves of the product's columns are read one by one, else 1.
        places: where each input that the members read lies, over [T, N / parts].
    """

    node: Node
    body: Graph
    linear: Node
    norm: Node | None
    x: Place
    weight: Node
    bias: Node | None
    members: tuple[Node, ...]
    parts: int
    places: Mapping[tuple[Node, int], Place]

    @classmethod
    def located(cls, node: Node) -> Problem | None:
        """The problem of a node whose operands lie where its graph says; None where ``of`` has
        none, and for other ops.
        """
        if node.op != "fused" or node.attr("kind") != "linear":
            return None
        return cls.of(node, tuple(None if arg is None else located(arg)[1] for arg in node.args))

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Problem | None:
        """The problem of a node, None where the kernels do not take it."""
        if node.attr("kind") != "linear":
            return None
        body = body_of(node)
        known = dict(zip(body.inputs, layouts, strict=True))
        products = [inner for inner in body.nodes if inner.op == "linear"]
        if len(products) != 1 or len(body.outputs) != 1:
            return None
        (linear,) = products
        left, weight, bias = linear.args
        assert left is not None and weight is not None
        norm = left if left.op == "rms_norm" else None
        source = left if norm is None else norm.operands[0]
        x = place_of(source, source.shape, known)
        weights = [weight, *(o for o in (bias, *(norm.args[1:] if norm else ())) if o is not None)]
        if x is None or not all(_is_plain(w, known) for w in weights):
            return None
        dense = x.column == 1 or source.shape[-1] == 1
        fits = isinstance(x.row, int) and dense and linear.type.rank == 2
        if not fits or linear.dtype not in FLOATS or weight.dtype is not linear.dtype:
            return None
        passive = BODY_VIEWS | {"input", "const"}
        members = tuple(
            n for n in body.nodes if n.op not in passive and n is not linear and n is not norm
        )
        parts = 2 if any(n.op == "slice" and linear in n.operands for n in body.nodes) else 1
        places = _places(members, linear, known)
        if places is None:
            return None
        return cls(node, body, linear, norm, x, weight, bias, members, parts, places)

    @property
    def k(self) -> int:
        """K: elements of a row of the weight."""
        return int(str(self.weight.shape[1]))

    @property
    def n(self) -> int:
        """Columns of the result."""
        return int(str(self.weight.shape[0])) // self.parts

    @property
    def tokens(self) -> Size:
        """T."""
        return self.linear.shape[0]

    @property
    def eps(self) -> float:
        """Of the norm."""
        return 0.0 if self.norm is None else attr_float(self.norm.attr("eps"))


def _is_plain(node: Node, known: Mapping[Node, Layout | None]) -> bool:
    """Whether an input of the body has a dense buffer of static shape."""
    layout = known.get(node)
    static = all(isinstance(size, int) and size > 0 for size in node.shape)
    return layout is not None and static and is_dense(layout, node.shape)


def _places(
    members: Sequence[Node], linear: Node, known: Mapping[Node, Layout | None]
) -> dict[tuple[Node, int], Place] | None:
    """Where the inputs that members read lie; None where one is out of reach."""
    found: dict[tuple[Node, int], Place] = {}
    for member in members:
        for position, arg in enumerate(member.args):
            if arg is None or _is_inner(arg, linear, members):
                continue
            place = place_of(arg, member.shape, known)
            if place is None:
                return None
            found[member, position] = place
    return found


def _is_inner(arg: Node, linear: Node, members: Sequence[Node]) -> bool:
    """Whether an operand is a const, the product, a half of it, or another member."""
    whole = arg.operands[0] if arg.op == "slice" else arg
    return arg.op == "const" or whole is linear or arg in members


def default_gemv(problem: Problem, target: Target) -> GemvTiles:
    """Tiles of a few KB, of which a program has two on their way, and many programs: measured on an
    H100, where they read as fast as a plain sum does (benchmarks/bench_linear.py).
    """
    long = problem.k > 8192
    block_k = min(2048 if long else 1024, max(_power(problem.k), 64))
    rows = 4 if long or problem.parts == 2 else 2
    return GemvTiles(
        min(rows // problem.parts, _power(problem.n)), block_k, max(1, min(8, block_k // 256))
    )


class Chosen(Protocol):
    """What a tuner found: the best cuts of kernels of ours, where None leaves the default, and
    where a library is faster than these.
    """

    def gemv(self, node: Node) -> GemvTiles | None:
        """For one token."""

    def gemm(self, node: Node, block_m: int) -> GemmTiles | None:
        """For up to ``block_m`` tokens."""

    def library(self, node: Node, tokens: int) -> bool:
        """Whether a library is the fastest for one token, or for up to ``tokens``."""

    def attention(self, node: Node) -> str | None:
        """Which library dense attention goes to (library.py)."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """What products of a graph are cut for.

    Attributes:
        most: tokens at most, None for any number: more are right all the same.
        chosen: by a tuner.
    """

    most: int | None = None
    chosen: Chosen | None = None

    def gemv(self, problem: Problem, target: Target) -> GemvTiles:
        """Tiles for one token."""
        chosen = None if self.chosen is None else self.chosen.gemv(problem.node)
        return chosen or default_gemv(problem, target)

    def gemms(self, problem: Problem, target: Target) -> list[GemmTiles] | None:
        """Tiles for several tokens; the last of them take any number. None where there is no
        kernel: no tiles fit the target, or the body holds an op that kernels lack.
        """
        most = self.most
        sizes = [m for m in _BUCKETS if most is None or m // 2 < most or m == _BUCKETS[0]]
        tiles = [self._gemm(problem, target, block_m) for block_m in sizes]
        gemms = [one for one in tiles if one is not None]
        return gemms if len(gemms) == len(tiles) and are_taken(problem, gemms) else None

    def library(self, problem: Problem, tokens: int) -> bool:
        """Whether a library is faster than the cut for so many tokens at most."""
        return self.chosen is not None and self.chosen.library(problem.node, tokens)

    def _gemm(self, problem: Problem, target: Target, block_m: int) -> GemmTiles | None:
        chosen = None if self.chosen is None else self.chosen.gemm(problem.node, block_m)
        return chosen or default_gemm(problem, target, block_m)


ANY = Cutting()
"""For any number of tokens, by default."""


def are_taken(problem: Problem, gemms: Sequence[GemmTiles]) -> bool:
    """Whether each split has columns, and kernels have each op of the body."""
    return all(tiles.has_work(problem.k) for tiles in gemms) and all(
        elementwise(m, ["x"] * len(m.args)) is not None for m in problem.members
    )


def default_gemm(problem: Problem, target: Target, block_m: int) -> GemmTiles | None:
    """Tiles for up to ``block_m`` tokens; None where none fit the target.

    Products with many columns have programs enough; those with few share their rows of weights.
    """
    if problem.linear.dtype is DType.F32:
        wanted = [(16, 32, 4, stages, 1) for stages in (3, 2, 1)]
    else:
        wanted = [*_wanted(problem, target, block_m), (16, 64, 4, 2, 1), (16, 32, 4, 1, 1)]
    ahead = _AHEAD if block_m <= 16 and problem.linear.dtype is not DType.F32 else 0
    for rows, block_k, num_warps, num_stages, splits in wanted:
        block_n = max(1, rows // problem.parts)
        tiles = GemmTiles(
            block_m,
            block_n,
            min(block_k, max(16, _power(problem.k))),
            num_warps,
            num_stages,
            splits,
            ahead,
        )
        fits = shared_bytes(problem, tiles) <= target.shared_memory_per_block
        if fits and tiles.has_work(problem.k):
            return tiles
    return None


def invariant_gemm(problem: Problem, target: Target) -> GemmTiles | None:
    """Tiles for any number of tokens, the same for all; None where none fit the target."""
    wide = problem.linear.dtype is DType.F32
    rows, block_k = (16, 32) if wide else (_ROWS, 64)
    for num_stages in (4, 3, 2, 1):
        tiles = GemmTiles(
            64,
            max(1, rows // problem.parts),
            min(block_k, max(16, _power(problem.k))),
            4,
            num_stages,
        )
        if shared_bytes(problem, tiles) <= target.shared_memory_per_block:
            return tiles
    return None


def _wanted(
    problem: Problem, target: Target, block_m: int
) -> Sequence[tuple[int, int, int, int, int]]:
    """(rows of weights, block_k, num_warps, num_stages, splits), the best first."""
    programs = problem.n * problem.parts / _ROWS / target.sms
    size = "few" if programs < _FEW else "some" if programs < _MANY else "many"
    return (_CUTS[size, block_m], (_ROWS, 64, 4, 4, 1), (_ROWS, 64, 4, 3, 1))


# Measured on an H100 (benchmarks/bench_linear.py): o and down have few programs, qkv has some,
# gate_up and lm_head have many.
_CUTS: Mapping[tuple[str, int], tuple[int, int, int, int, int]] = {
    ("few", 16): (64, 128, 4, 3, 4),
    ("few", 32): (64, 256, 4, 3, 2),
    ("few", 64): (64, 128, 4, 4, 2),
    ("few", 128): (64, 64, 4, 6, 2),
    ("some", 16): (64, 256, 4, 3, 1),
    ("some", 32): (64, 128, 4, 5, 1),
    ("some", 64): (64, 64, 4, 8, 1),
    ("some", 128): (64, 64, 4, 8, 1),
    ("many", 16): (64, 128, 4, 4, 1),
    ("many", 32): (64, 128, 4, 3, 1),
    ("many", 64): (128, 128, 8, 3, 1),
    ("many", 128): (128, 64, 4, 4, 1),
}
_AHEAD = 512  # columns: at 8 tokens a step of Llama-3-8B takes 0.6% less with them
_ROWS = 64  # what one instruction takes from the left
_FEW, _MANY = 0.7, 3.0  # programs a multiprocessor


def shared_bytes(problem: Problem, tiles: GemmTiles) -> int:
    """Shared memory of a block, an upper bound: weights and tokens in flight, one result."""
    rows = tiles.block_n * problem.parts
    in_flight = tiles.num_stages * tiles.block_k * (rows + tiles.block_m)
    return in_flight * problem.linear.dtype.bytes + 4 * rows * tiles.block_m + (1 << 10)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
