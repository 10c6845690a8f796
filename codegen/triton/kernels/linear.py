"""Decode linears: a product with few rows, the norm before it and the elementwise ops behind it.

One token goes through FMA units, a few rows of weights a program, with the first weights on their
way before the kernel before has ended. Several tokens go through tensor cores, weights to the left;
their norm is a launch of its own, for every program would need all of it, unless the product before
hands on what it takes (linear_hands.py). The body's ops become lines of the kernel's text, as in
generated kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ....ir.dims import Size, call
from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.printer import value_names
from ....targets import Target
from ..generate_text import helper_text, kernel_text
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
from . import linear_kernel
from .linear_epilogue import Epilogue
from .linear_hands import MOST_HANDED, Hands
from .linear_tiles import (
    ANY,
    Cutting,
    GemmTiles,
    GemvTiles,
    Problem,
    are_taken,
    invariant_gemm,
)

_FUNCTIONS = (
    *("_weights", "_inputs", "_prefetch", "_one_token", "_sums", "_tokens"),
    *("_gathered", "_hand_on", "_normalise"),
)
_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "AHEAD", PDL)
_ALONE = Hands()


def emit_linear(
    node: Node,
    layouts: tuple[Layout | None, ...],
    target: Target,
    cutting: Cutting = ANY,
    hands: Hands = _ALONE,
) -> KernelSource | None:
    """A kernel for a ``fused`` node of kind "linear" in float16, bfloat16 or float32, cut as
    ``cutting`` says; ``hands`` says what is handed to it and by it.

    None for other nodes, where an operand has no rows with a static stride, and where a body holds
    an op that kernels lack.
    """
    problem = Problem.of(node, layouts)
    gemms = None if problem is None else cutting.gemms(problem, target)
    if problem is None or gemms is None:
        return None
    return linear_source(problem, target, cutting.gemv(problem, target), gemms, hands)


def emit_invariant_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_linear``, for any number of tokens with one cut, that of many tokens and no parts:
    a token's sums come in one order, whatever it is computed with.
    """
    problem = Problem.of(node, layouts)
    tiles = None if problem is None else invariant_gemm(problem, target)
    if problem is None or tiles is None:
        return None
    return linear_source(problem, target, None, [tiles])


def linear_source(
    problem: Problem,
    target: Target,
    gemv: GemvTiles | None,
    gemms: Sequence[GemmTiles],
    hands: Hands = _ALONE,
) -> KernelSource | None:
    """The kernel of a problem with these tiles: ``gemv`` for one token (None: as for several), the
    first of ``gemms`` that holds all tokens for several, the last one for any number. Without
    ``gemms`` the kernel is never called for more than one.

    None where the body holds an op that kernels lack, a split would have no columns, or a program
    a part of a sum that is handed on. Of two products between which something is handed on both
    have a ``gemv`` or neither, and tiles of the same numbers of tokens.
    """
    handing = [tiles for tiles in gemms if tiles.block_m <= MOST_HANDED]
    whole = not hands.given or all(tiles.block_n % hands.given == 0 for tiles in handing)
    if not whole or not are_taken(problem, gemms):
        return None
    entries = _Entries(problem, has_pdl(target))
    variants = []
    if gemv is not None:
        guard = (1 - problem.tokens,) if gemms else ()
        variants.append(Variant((entries.one_token(gemv),), guard=guard))
    for index, tiles in enumerate(gemms):
        last = index == len(gemms) - 1
        guard = () if last else (tiles.block_m - problem.tokens,)
        handed = hands if tiles.block_m <= MOST_HANDED else _ALONE
        variants.append(replace(entries.tokens(tiles, handed), guard=guard))
    text = HEADER + helper_text(entries.lines) + jit_text(linear_kernel, _FUNCTIONS)
    text += "".join(entries.texts.values())
    return KernelSource(problem.body.name, "template", text, tuple(variants))


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the product of several tokens multiplies.

    Attributes:
        suffix: of the entry point's name.
        text: start, stride, and sums of squares with their number, as ``_tokens`` takes them.
        arguments: what the text names, beside operands of the node.
        scale: the line that scales the product by what it was handed, if anything.
        space: of a workspace, with the launch that fills it.
    """

    suffix: str
    text: tuple[str, str]
    arguments: tuple[Argument, ...] = ()
    scale: tuple[str, ...] = ()
    space: tuple[tuple[DType, Size], ...] = ()
    launches: tuple[Launch, ...] = ()


@dataclass(slots=True)
class _Entries:
    """The entry points of a kernel's text: for one token, and for several."""

    problem: Problem
    pdl: bool
    texts: dict[str, str] = field(default_factory=dict)
    epilogue: Epilogue = field(init=False)
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = {node: f"{name}_" for node, name in value_names(self.problem.body).items()}
        self.epilogue = Epilogue(self.problem, names)
        self.lines = self.epilogue.lines()

    def one_token(self, tiles: GemvTiles) -> Launch:
        """The launch for one token."""
        p = self.problem
        norm = "None" if self._norm_weight() is None else self._pointer(self._norm_weight())
        product = (
            f"acc = _one_token({self._x_start()}, {norm}, {self._pointer(p.weight)}, weight_rows, "
            f"{p.k}, {p.norm is not None}, {p.eps!r}, BLOCK_K, PDL)"
        )
        name = p.body.name
        arguments = self._arguments(p.body.inputs)
        self._enter(name, arguments, [product, *self.lines])
        grid = (-(-p.n // tiles.block_n), 1, 1)
        constants = self._constants(1, tiles.block_n, tiles.block_k, 1, 0)
        return Launch(name, arguments, grid, constants, tiles.num_warps)

    def tokens(self, tiles: GemmTiles, hands: Hands) -> Variant:
        """The launches for several tokens."""
        p, x = self.problem, self._rows(hands)
        behind = {p.weight, p.bias, *(place.source for place in p.places.values())}
        inputs = [node for node in p.body.inputs if p.norm is None or node in behind]
        arguments = [*self._arguments(inputs), *x.arguments, *hands.results(p)]
        spaces = list(x.space)
        blocks = call("floordiv", p.tokens + (tiles.block_m - 1), tiles.block_m)
        columns = -(-p.n // tiles.block_n)
        counters: Size = 0
        if tiles.splits > 1:
            tile = tiles.block_m * tiles.block_n * p.parts
            arguments.append(Pointer("partial_ptr", DType.F32, "workspace", len(spaces)))
            arguments.append(Pointer("counter_ptr", DType.I32, "counter", 0))
            spaces.append((DType.F32, blocks * (columns * tiles.splits * tile)))
            counters = blocks * columns
        name = p.body.name + x.suffix + ("_handed_on" if hands.given else "")
        name += "_in_parts" if tiles.splits > 1 else ""
        self._enter(name, arguments, self._product(x, hands, tiles.splits > 1))
        constants = self._constants(
            tiles.block_m, tiles.block_n, tiles.block_k, tiles.splits, tiles.ahead
        )
        grid = (columns, blocks, tiles.splits)
        launch = Launch(name, tuple(arguments), grid, constants, tiles.num_warps, tiles.num_stages)
        return Variant((*x.launches, launch), tuple(spaces), (), counters)

    def _rows(self, hands: Hands) -> _Rows:
        """The rows of x: as they are, normalised by a launch before, or as they were handed on."""
        p = self.problem
        if hands.taken:
            pointers = hands.operands(p)
            scaled, squares = (pointer.name for pointer in pointers)
            scale = f"acc *= tl.rsqrt(total / {p.k} + {p.eps!r})"
            text = f"{scaled}, {p.k}", f"{squares}, {p.k // hands.taken}"
            return _Rows("_of_scaled", text, pointers, (scale,))
        if p.norm is None:
            return _Rows("_of_tokens", (f"{self._x_start()}, {p.x.row}", "None, 0"))
        normed = Pointer("normed_ptr", p.linear.dtype, "workspace", 0)
        space = (p.linear.dtype, p.tokens * p.k)
        text = f"{normed.name}, {p.k}", "None, 0"
        return _Rows("_of_normed", text, (normed,), (), (space,), (self._normalise(normed),))

    def _product(self, x: _Rows, hands: Hands, parts: bool) -> list[str]:
        """The lines of the product of several tokens, and what follows it."""
        p, (rows, squares) = self.problem, x.text
        product = (
            f"acc, total = _tokens({rows}, {self._pointer(p.weight)}, weight_rows, "
            f"tl.minimum(tl.reshape(token, (BLOCK_M,)), tokens - 1), {squares}, {p.k}, BLOCK_K, "
            "SPLITS, AHEAD, PDL)"
        )
        behind = [*x.scale, *self.lines, *hands.lines(p)]
        if not parts:
            return [product, *behind]
        gathered = "acc, last = _gathered(acc, partial_ptr, counter_ptr, SPLITS)"
        return [product, gathered, "if last:", *(f"    {line}" for line in behind)]

    def _constants(
        self, block_m: int, block_n: int, block_k: int, splits: int, ahead: int
    ) -> dict[str, Constexpr]:
        return dict(
            zip(_CONSTANTS, (block_m, block_n, block_k, splits, ahead, self.pdl), strict=True)
        )

    def _enter(self, name: str, arguments: Sequence[Argument], lines: Sequence[str]) -> None:
        """Adds an entry point of these lines, once."""
        if name in self.texts:
            return
        names = [argument.name for argument in arguments]
        about = str(self.problem.body)
        self.texts[name] = kernel_text(name, about, names, [*self._preamble(), *lines], _CONSTANTS)

    def _preamble(self) -> list[str]:
        """Which columns and tokens a program has, and the rows of weights that they need."""
        n, parts = self.problem.n, self.problem.parts
        column = "tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)"
        lines = [
            f"column = ({column})[:, None]",
            "token = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]",
            f"there = (column < {n}) & (token < tokens)",
        ]
        if parts == 1:
            lines.append(f"weight_rows = tl.minimum({column}, {n - 1})")
        else:  # a row of each half in turn, to be split again
            lines += [
                "both = tl.arange(0, 2 * BLOCK_N)",
                f"weight_rows = tl.minimum(tl.program_id(0) * BLOCK_N + both // 2, {n - 1})",
                f"weight_rows += both % 2 * {n}",
            ]
        return lines

    def _normalise(self, normed: Pointer) -> Launch:
        """The launch that normalises every row into a workspace."""
        p = self.problem
        assert p.norm is not None
        name, weight = f"{p.body.name}_normalise", self._norm_weight()
        arguments = (
            *self._arguments([n for n in (p.x.source, weight) if n is not None], ()),
            normed,
        )
        scale = "None" if weight is None else self._pointer(weight)
        line = (
            f"_normalise({self._x_start()}, {scale}, {normed.name}, {p.x.row}, {p.k}, {p.eps!r}, "
            f"{bool(p.norm.attr('stepwise'))}, BLOCK_K, PDL)"
        )
        names = [argument.name for argument in arguments]
        self.texts[name] = kernel_text(name, str(p.norm), names, [line], ("BLOCK_K", PDL))
        block = 1 << (p.k - 1).bit_length()
        warps = max(1, min(8, block // 256))
        return Launch(name, arguments, (p.tokens, 1, 1), {"BLOCK_K": block, PDL: self.pdl}, warps)

    def _arguments(
        self, inputs: Sequence[Node], more: Sequence[Argument] | None = None
    ) -> tuple[Argument, ...]:
        pointers = (
            Pointer(self._pointer(node), node.dtype, "operand", position)
            for position, node in enumerate(self.problem.body.inputs)
            if node in inputs
        )
        if more is not None:
            return (*pointers, *more)
        result = Pointer("out_ptr", self.problem.node.dtype, "result", 0)
        return (*pointers, result, Scalar("tokens", self.problem.tokens))

    def _norm_weight(self) -> Node | None:
        norm = self.problem.norm
        return None if norm is None else norm.args[1]

    def _x_start(self) -> str:
        x = self.problem.x
        return self._pointer(x.source) + (f" + {x.offset}" if x.offset != 0 else "")

    def _pointer(self, node: Node | None) -> str:
        return self.epilogue.pointer(node)
