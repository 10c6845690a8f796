"""Mixtures of experts: each token through its own k experts, without a word from the host.

Few tokens, whose pairs (a token and one of its slots) hardly share an expert, take a program for
each pair and few rows of its expert: two launches. More tokens are first put in order of their
experts, each expert's pairs from the start of a tile on; then each tile is a product with the
weights of one expert, and a last launch adds up each token's slots. Grids hold as many tiles as
there can be, so they depend on the number of tokens alone, and a CUDA graph may hold them.

Sums are float32. As in the op's reference, what ``down`` takes is rounded to the model's type, and
in the kernels for many tokens what it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ....ir.dims import Size, call
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..cuts import Cuts
from ..generate_ops import native
from ..generate_text import helper_text
from ..layout import Layout
from ..source import (
    HEADER,
    PDL,
    Argument,
    Constexpr,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
    has_pdl,
    jit_text,
)
from . import experts_kernel, linear_kernel
from .entries import described, entry_of
from .experts_tiles import (
    PRODUCTS,
    Groups,
    GroupTiles,
    Problem,
    Rows,
    buckets,
    default_groups,
    default_rows,
    invariant_groups,
    most_row_tokens,
)

_OPERANDS = ("x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
_FUNCTIONS = (
    *("_expert_of", "_most_tiles", "_place", "_tile_and_block", "_tile_of", "_within"),
    *("_sums", "_pairs_of_sums", "_activated", "_gate_up", "_down", "_weighted"),
    *("_gate_up_rows", "_down_rows"),
)
_HELPERS = ("_silu(", "_gelu(", "_gelu_tanh(", "_relu(", "_sigmoid(")
_CHUNK, _LEAST_CHUNK = 2048, 64  # pairs that a program of the first launch looks at at once
_LEAST_BINS = 32
_SUMMED = 1024  # columns of a program of the last launch


def emit_experts(
    node: Node,
    layouts: tuple[Layout | None, ...],
    target: Target,
    cuts: Cuts | None = None,
    most: int | None = None,
) -> KernelSource | None:
    """A kernel for ``moe_experts`` in float32, float16 or bfloat16, cut as ``cuts`` says for up to
    ``most`` tokens (None: any number; more are right all the same).

    None where the element type is another, a size of the weights is symbolic, an operand has no
    static place, x or a matrix of weights no axis that lies in one piece, a bias is a view, or no
    tile fits the target's shared memory.
    """
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    groups: list[tuple[Groups, int | None]] = []
    for block_m, limit in buckets(problem, most):
        tiles = _groups(problem, target, block_m)
        if tiles is None:
            return None
        chosen = None if cuts is None else cuts.expert_groups(node, block_m)
        groups.append((chosen or tiles, limit))
    if not problem.in_rows:
        return experts_source(problem, target, None, groups)
    rows = None if cuts is None else cuts.expert_rows(node)
    default = default_rows(problem, "gate_up"), default_rows(problem, "down")
    return experts_source(problem, target, rows or default, groups)


def _groups(problem: Problem, target: Target, block_m: int) -> Groups | None:
    first, second = (default_groups(problem, product, target, block_m) for product in PRODUCTS)
    return None if first is None or second is None else (first, second)


def emit_invariant_experts(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_experts``, with one cut for any number of tokens: a token's sums come in one order,
    whatever it is computed with.
    """
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    gate_up, down = (invariant_groups(problem, product, target) for product in PRODUCTS)
    if gate_up is None or down is None:
        return None
    return experts_source(problem, target, None, [((gate_up, down), None)])


def experts_source(
    problem: Problem,
    target: Target,
    rows: Rows | None,
    groups: Sequence[tuple[Groups, int | None]],
) -> KernelSource:
    """The kernel of a problem with these tiles.

    Args:
        problem: what it computes.
        target: the device.
        rows: of gate_up and down, for up to ``most_row_tokens`` tokens; None: as for more.
        groups: for more tokens, each with the most that it is for; the last one is for any number.
            Without any, the kernel is never called for more than the ``rows``.
    """
    entries = _Entries(problem, has_pdl(target))
    variants = []
    if rows is not None:
        guard = (most_row_tokens(problem) - problem.tokens,) if groups else ()
        variants.append(entries.in_rows(rows, guard))
    for index, (tiles, most) in enumerate(groups):
        last = index == len(groups) - 1
        guard = () if last or most is None else (most - problem.tokens,)
        variants.append(entries.in_groups(tiles, None if last else most, guard))
    texts = (
        HEADER,
        described(problem.node, _OPERANDS),
        helper_text(_HELPERS),
        jit_text(linear_kernel, ("_weights", "_inputs", "_one_token")),
        jit_text(experts_kernel, _FUNCTIONS),
        *entries.texts.values(),
    )
    contracts = problem.dtype is not DType.F32
    return KernelSource("experts", "template", "".join(texts), tuple(variants), contracts)


@dataclass(slots=True)
class _Entries:
    """The entry points of a kernel's text, one for each function."""

    problem: Problem
    pdl: bool
    texts: dict[str, str] = field(default_factory=dict)

    def in_rows(self, tiles: Rows, guard: tuple[Size, ...]) -> Variant:
        """The launches for few tokens."""
        p, (first, second) = self.problem, tiles
        space, hidden = self._space(p.pairs * p.inner, "hidden", 0)
        launches = (
            self._launch(
                "gate_up_rows",
                (*self._operands("x", "ids", "gate_up", "gate_up_bias"), hidden),
                (-(-p.inner // first.block_n), p.pairs, 1),
                self._ids() | self._x() | self._rows_of(3) | self._sizes("F", "K") | self._act(),
                {"BLOCK_N": first.block_n, "BLOCK_K": first.block_k},
                first.num_warps,
            ),
            self._launch(
                "down_rows",
                (hidden, *self._operands("ids", "weights", "down", "down_bias"), self._out()),
                (-(-p.width // second.block_n), p.tokens, 1),
                self._ids() | self._weights() | self._rows_of(4) | self._sizes("F", "K"),
                {"BLOCK_N": second.block_n, "BLOCK_K": second.block_k},
                second.num_warps,
            ),
        )
        return Variant(launches, (space,), guard)

    def in_groups(self, tiles: Groups, most: int | None, guard: tuple[Size, ...]) -> Variant:
        """The launches for up to ``most`` tokens, or any number."""
        p, (first, second) = self.problem, tiles
        block_m = first.block_m
        assert second.block_m == block_m, "both products have the same tiles of pairs"
        count = _most_tiles(p, block_m)
        hidden_space, hidden = self._space(p.pairs * p.inner, "hidden", 0)
        result_space, results = self._space(p.pairs * p.width, "results", 1)
        order = Pointer("order", DType.I32, "workspace", 2)
        experts = Pointer("experts", DType.I32, "workspace", 3)
        tokens = Scalar("tokens", p.tokens)
        placed = (order, experts)
        launches = (
            self._place(placed, tokens, block_m, most),
            self._launch(
                "gate_up",
                (
                    *self._operands("x"),
                    *placed,
                    *self._operands("gate_up", "gate_up_bias"),
                    hidden,
                    tokens,
                ),
                (count * -(-p.inner // first.block_n), 1, 1),
                self._x() | self._matrix(3) | self._sizes("F", "K") | self._act(),
                _blocks(first),
                first.num_warps,
                first.num_stages,
            ),
            self._launch(
                "down",
                (hidden, *placed, *self._operands("down", "down_bias"), results, tokens),
                (count * -(-p.width // second.block_n), 1, 1),
                self._matrix(4) | self._sizes("F", "K"),
                _blocks(second),
                second.num_warps,
                second.num_stages,
            ),
            self._weighted(results),
        )
        spaces = (
            hidden_space,
            result_space,
            (DType.I32, count * block_m),
            (DType.I32, count),
        )
        return Variant(launches, spaces, guard)

    def _place(
        self, placed: tuple[Pointer, ...], tokens: Scalar, block_m: int, most: int | None
    ) -> Launch:
        p = self.problem
        chunk = _CHUNK if most is None else min(_CHUNK, max(_LEAST_CHUNK, _power(most * p.slots)))
        bins: dict[str, Constexpr | None] = {"BINS": max(_LEAST_BINS, _power(p.experts + 1))}
        return self._launch(
            "place",
            (*self._operands("ids"), *placed, tokens),
            (p.experts, 1, 1),
            self._ids() | self._sizes() | bins,
            {"CHUNK": chunk, "BLOCK_M": block_m},
            max(1, min(8, chunk // 128)),
        )

    def _weighted(self, results: Pointer) -> Launch:
        p = self.problem
        block = min(_SUMMED, max(16, _power(p.width)))
        sizes: dict[str, Constexpr | None] = {"SLOTS": p.slots, "K": p.width}
        return self._launch(
            "weighted",
            (results, *self._operands("weights"), self._out()),
            (p.tokens, -(-p.width // block), 1),
            self._weights() | sizes,
            {"BLOCK_N": block},
            max(1, block // 256),
        )

    def _launch(
        self,
        name: str,
        arguments: tuple[Argument, ...],
        grid: tuple[Size, Size, Size],
        constants: Mapping[str, Constexpr | None],
        cut: Mapping[str, Constexpr],
        num_warps: int,
        num_stages: int = 1,
    ) -> Launch:
        """The launch of a function of experts_kernel.py: what is alike in all variants stands in
        the text of its entry, the cut is the launch's.
        """
        constexprs = {**cut, PDL: self.pdl}
        launch = Launch(f"experts_{name}", arguments, grid, constexprs, num_warps, num_stages)
        given = {argument.name for argument in arguments}
        absent = {n: None for n in _ABSENT.get(name, ()) if n not in given}
        entry = entry_of(launch, f"_{name}", (), {**absent, **constants})
        known = self.texts.setdefault(launch.function, entry.text)
        assert known == entry.text, "variants differ in what their launches are given alone"
        return entry.launch

    def _operands(self, *names: str) -> tuple[Pointer, ...]:
        """Pointers to those of the named operands that there are."""
        args = self.problem.node.args
        found = []
        for name in names:
            index = _OPERANDS.index(name)
            arg = args[index]
            if arg is not None:
                found.append(Pointer(name, arg.dtype, "operand", index))
        return tuple(found)

    def _out(self) -> Pointer:
        return Pointer("out", self.problem.dtype, "result", 0)

    def _space(self, size: Size, name: str, index: int) -> tuple[tuple[DType, Size], Pointer]:
        dtype = self.problem.dtype
        return (dtype, size), Pointer(name, dtype, "workspace", index)

    def _sizes(self, *names: str) -> dict[str, Constexpr | None]:
        p = self.problem
        every = {"SLOTS": p.slots, "E": p.experts, "F": p.inner, "K": p.width}
        return {name: every[name] for name in ("SLOTS", "E", *names)}

    def _ids(self) -> dict[str, Constexpr | None]:
        return self._placed("IDS", 1)

    def _weights(self) -> dict[str, Constexpr | None]:
        return self._placed("WEIGHTS", 2)

    def _placed(self, prefix: str, operand: int) -> dict[str, Constexpr | None]:
        row, column = self.problem.strides(operand)
        offset = self.problem.offset(operand)
        return {f"{prefix}_OFFSET": offset, f"{prefix}_ROW": row, f"{prefix}_COLUMN": column}

    def _x(self) -> dict[str, Constexpr | None]:
        return {"X_OFFSET": self.problem.offset(0), "X_ROW": self.problem.strides(0)[0]}

    def _rows_of(self, operand: int) -> dict[str, Constexpr | None]:
        p = self.problem
        return {"W_OFFSET": p.offset(operand), "W_EXPERT": p.strides(operand)[0]}

    def _matrix(self, operand: int) -> dict[str, Constexpr | None]:
        _, row, column = self.problem.strides(operand)
        return self._rows_of(operand) | {"W_ROW": row, "W_COLUMN": column}

    def _act(self) -> dict[str, Constexpr | None]:
        p = self.problem
        return {
            "INTERLEAVED": p.interleaved,
            "ACTIVATION": str(p.node.attr("activation")),
            "LIMIT": p.number("limit"),
            "ALPHA": p.number("alpha"),
            "NATIVE": native(p.dtype),
        }


_ABSENT: Mapping[str, tuple[str, ...]] = {
    "gate_up": ("gate_up_bias",),
    "gate_up_rows": ("gate_up_bias",),
    "down": ("down_bias",),
    "down_rows": ("down_bias",),
}


def _blocks(tiles: GroupTiles) -> dict[str, Constexpr]:
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "GROUP": tiles.group,
    }


def _most_tiles(problem: Problem, block_m: int) -> Size:
    """As ``_most_tiles`` of experts_kernel.py."""
    pairs = problem.pairs
    used = call("min", pairs, problem.experts)
    return call("floordiv", pairs + used * (block_m - 1), block_m)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
