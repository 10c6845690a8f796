"""Decode linears: a product with few rows, the norm before it and the elementwise ops behind it.

One token goes through FMA units, a few rows of weights a program, with the first weights on their
way before the kernel before has ended. Several tokens go through tensor cores, weights to the left;
their norm is a launch of its own, for every program would need all of it. The body's ops become
lines of the kernel's text, as in generated kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ....ir.dims import Size, call
from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.printer import value_names
from ....targets import Target
from ..generate_ops import TRITON_NAMES, elementwise, held, operand, rounded
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
from .linear_tiles import (
    GemmTiles,
    GemvTiles,
    Problem,
    default_gemm,
    default_gemv,
    invariant_gemm,
)
from .linear_views import Place

_BUCKETS = (16, 32, 64, 128)  # tokens of a program; the last of them takes any number, in blocks
_FUNCTIONS = (
    *("_weights", "_inputs", "_prefetch", "_one_token", "_tokens"),
    *("_gathered", "_normalise"),
)
_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "AHEAD", PDL)


def emit_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target, most: int | None = None
) -> KernelSource | None:
    """A kernel for a ``fused`` node of kind "linear" in float16, bfloat16 or float32; cut for up to
    ``most`` tokens, right for any number.

    None for other nodes, where an operand has no rows with a static stride, and where a body holds
    an op that kernels lack.
    """
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    tiles = [default_gemm(problem, target, block_m) for block_m in _buckets(most)]
    if any(one is None for one in tiles):
        return None
    gemms = [one for one in tiles if one is not None]
    return linear_source(problem, target, default_gemv(problem, target), gemms)


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


def _buckets(most: int | None) -> Sequence[int]:
    """Tokens of a program, up to the first that holds ``most`` of them."""
    if most is None:
        return _BUCKETS
    return [size for size in _BUCKETS if size // 2 < most or size == _BUCKETS[0]]


def linear_source(
    problem: Problem, target: Target, gemv: GemvTiles | None, gemms: Sequence[GemmTiles]
) -> KernelSource | None:
    """The kernel of a problem with these tiles: ``gemv`` for one token (None: as for several), the
    first of ``gemms`` that holds all tokens for several, the last one for any number.

    None where the body holds an op that kernels lack, or a split would have no columns.
    """
    if not all(tiles.has_work(problem.k) for tiles in gemms):
        return None
    if not all(elementwise(m, ["x"] * len(m.args)) is not None for m in problem.members):
        return None
    entries = _Entries(problem, has_pdl(target))
    variants = []
    if gemv is not None:
        variants.append(Variant((entries.one_token(gemv),), guard=(1 - problem.tokens,)))
    for index, tiles in enumerate(gemms):
        last = index == len(gemms) - 1
        guard = () if last else (tiles.block_m - problem.tokens,)
        variants.append(replace(entries.tokens(tiles), guard=guard))
    text = HEADER + helper_text(entries.lines) + jit_text(linear_kernel, _FUNCTIONS)
    text += "".join(entries.texts.values())
    return KernelSource(problem.body.name, "template", text, tuple(variants))


@dataclass(slots=True)
class _Entries:
    """The entry points of a kernel's text: for one token, and for several."""

    problem: Problem
    pdl: bool
    texts: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    names: Mapping[Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {node: f"{name}_" for node, name in value_names(self.problem.body).items()}

    def one_token(self, tiles: GemvTiles) -> Launch:
        """The launch for one token."""
        p = self.problem
        norm = "None" if self._norm_weight() is None else self._pointer(self._norm_weight())
        product = (
            f"_one_token({self._x_start()}, {norm}, {self._pointer(p.weight)}, weight_rows, "
            f"{p.k}, {p.norm is not None}, {p.eps!r}, BLOCK_K, PDL)"
        )
        name = p.body.name
        arguments = self._arguments(p.body.inputs)
        self._enter(name, arguments, product)
        grid = (-(-p.n // tiles.block_n), 1, 1)
        constants = self._constants(1, tiles.block_n, tiles.block_k, 1, 0)
        return Launch(name, arguments, grid, constants, tiles.num_warps)

    def tokens(self, tiles: GemmTiles) -> Variant:
        """The launches for several tokens."""
        p = self.problem
        normed = p.norm is not None
        behind = {p.weight, p.bias, *(place.source for place in p.places.values())}
        inputs = [node for node in p.body.inputs if not normed or node in behind]
        arguments = list(self._arguments(inputs))
        spaces: list[tuple[DType, Size]] = []
        x, stride = self._x_start(), p.x.row
        if normed:
            x, stride = "normed_ptr", p.k
            arguments.append(Pointer(x, p.linear.dtype, "workspace", len(spaces)))
            spaces.append((p.linear.dtype, p.tokens * p.k))
        blocks = call("floordiv", p.tokens + (tiles.block_m - 1), tiles.block_m)
        columns = -(-p.n // tiles.block_n)
        counters: Size = 0
        if tiles.splits > 1:
            tile = tiles.block_m * tiles.block_n * p.parts
            arguments.append(Pointer("partial_ptr", DType.F32, "workspace", len(spaces)))
            arguments.append(Pointer("counter_ptr", DType.I32, "counter", 0))
            spaces.append((DType.F32, blocks * (columns * tiles.splits * tile)))
            counters = blocks * columns
        product = (
            f"_tokens({x}, {stride}, {self._pointer(p.weight)}, weight_rows, "
            f"tl.minimum(tl.reshape(token, (BLOCK_M,)), tokens - 1), {p.k}, BLOCK_K, SPLITS, "
            "AHEAD, PDL)"
        )
        name = p.body.name + ("_of_normed" if normed else "_of_tokens")
        name += "_in_parts" if tiles.splits > 1 else ""
        self._enter(name, arguments, product, tiles.splits > 1)
        constants = self._constants(
            tiles.block_m, tiles.block_n, tiles.block_k, tiles.splits, tiles.ahead
        )
        grid = (columns, blocks, tiles.splits)
        launch = Launch(name, tuple(arguments), grid, constants, tiles.num_warps, tiles.num_stages)
        launches = (self._normalise(), launch) if normed else (launch,)
        return Variant(launches, tuple(spaces), (), counters)

    def _constants(
        self, block_m: int, block_n: int, block_k: int, splits: int, ahead: int
    ) -> dict[str, Constexpr]:
        return dict(
            zip(_CONSTANTS, (block_m, block_n, block_k, splits, ahead, self.pdl), strict=True)
        )

    def _enter(
        self, name: str, arguments: Sequence[Argument], product: str, parts: bool = False
    ) -> None:
        """Adds an entry point around the call that computes the product, f32 [rows, tokens]."""
        if name in self.texts:
            return
        epilogue = self._epilogue()
        self.lines += epilogue
        lines = [*self._preamble(), f"acc = {product}"]
        if parts:
            lines.append("acc, last = _gathered(acc, partial_ptr, counter_ptr, SPLITS)")
            lines += ["if last:", *(f"    {line}" for line in epilogue)]
        else:
            lines += epilogue
        names = [argument.name for argument in arguments]
        self.texts[name] = kernel_text(name, str(self.problem.body), names, lines, _CONSTANTS)

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

    def _epilogue(self) -> list[str]:
        """What becomes of the product, and the store."""
        p, lines = self.problem, []
        if p.bias is not None:
            bias = f"tl.load({self._pointer(p.bias)} + weight_rows).to(tl.float32)[:, None]"
            lines.append(f"acc += {bias}")
        lines.append(f"acc = {rounded('acc', p.linear.dtype)}")
        if p.parts == 2:
            halves = "tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1))"
            lines.append(f"first, second = tl.split({halves})")
        result = "acc"
        for member in p.members:
            texts = [
                self._operand(member, position, arg, lines)
                for position, arg in enumerate(member.args)
                if arg is not None
            ]
            text = elementwise(member, texts)
            assert text is not None
            result = self.names[member]
            lines.append(f"{result} = {text}")
        stored = f"{result}.to({TRITON_NAMES[p.node.dtype]})"
        lines.append(
            f"tl.store(out_ptr + token.to(tl.int64) * {p.n} + column, {stored}, mask=there)"
        )
        return lines

    def _operand(self, member: Node, position: int, arg: Node, lines: list[str]) -> str:
        """A member's operand as a variable or literal; what lies in memory is loaded into one."""
        p = self.problem
        if arg.op == "const":
            return operand(member, arg)
        if arg.op == "slice" and p.linear in arg.operands:
            return "first" if arg.attr("start") == 0 else "second"
        if arg is p.linear:
            return "acc"
        if arg in p.members:
            return self.names[arg]
        name = f"{self.names[arg]}in"
        lines.append(f"{name} = {self._load(p.places[member, position])}")
        return name

    def _load(self, place: Place) -> str:
        address = f"{self._pointer(place.source)} + {place.offset}"
        masks = []
        if place.row != 0:
            address += f" + token.to(tl.int64) * {place.row}"
            masks.append("(token < tokens)")
        if place.column != 0:
            address += f" + column * {place.column}"
            masks.append(f"(column < {self.problem.n})")
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        return f"tl.load({address}{mask}).to({held(place.source.dtype)})"

    def _normalise(self) -> Launch:
        """The launch that normalises every row into a workspace."""
        p = self.problem
        assert p.norm is not None
        name, weight = f"{p.body.name}_normalise", self._norm_weight()
        arguments = (
            *self._arguments([n for n in (p.x.source, weight) if n is not None], ()),
            Pointer("normed_ptr", p.linear.dtype, "workspace", 0),
        )
        line = (
            f"_normalise({self._x_start()}, {'None' if weight is None else self._pointer(weight)}, "
            f"normed_ptr, {p.x.row}, {p.k}, {p.eps!r}, {bool(p.norm.attr('stepwise'))}, BLOCK_K, "
            "PDL)"
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
        assert node is not None
        return f"{self.names[node]}ptr"
