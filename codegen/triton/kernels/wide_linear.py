"""Products of many tokens: by tensor descriptors (TMA), with the norm before them and the
elementwise ops behind them.

As many programs as there are multiprocessors go through the tiles of the result, in groups that
share what lies in the L2 cache (Triton's persistent matmul has this shape). The norm is a launch of
its own, and the ops behind are those of decode linears, in the same words (linear_epilogue.py).

Halves of columns that meet behind the product, a gated MLP's, are two products of the same rows. A
tile of the result needs the same columns of both, so the weight [2 N, K] is read as [2, N, K]: a
tile of it holds both, lies in shared memory as one operand of the tensor cores, and the halves of
their sum are taken apart in registers. What lies between, twice as wide as the result, is never
written: 0.12 of 1.5 ms for 4096 tokens of Llama-3-8B, which a library's product and a kernel behind
it take.

Where tiles do not fill whole rounds of programs, their steps may be dealt out evenly (stream-K;
Osama et al., 2023): who has a tile's first steps adds up what the others leave of it in float32, in
their order, so that results do not depend on who comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ....ir.dtypes import DType
from ....ir.printer import value_names
from ....targets import Target
from ..generate_ops import rounded
from ..generate_text import helper_text, kernel_text
from ..source import (
    HEADER,
    PDL,
    START_EARLY,
    Argument,
    Constexpr,
    KernelSource,
    Launch,
    Pointer,
    Variant,
    has_pdl,
    jit_text,
)
from . import linear_kernel, wide_linear_kernel
from .linear import _Entries
from .linear_epilogue import Epilogue
from .linear_hands import Hands
from .linear_tiles import Problem
from .wide_linear_tiles import WideTiles, default_wide

_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "PROGRAMS", "FLAT", PDL)
_SPLIT = "tl.split(tl.permute(tl.reshape({}, (BLOCK_M, 2, {})), (0, 2, 1)))"
"""Two halves of columns, which are of the same threads."""
_SHARED = ("_share", "_piece", "_halves", "_cells", "_leave", "_gather")


def wide_source(
    problem: Problem, target: Target, tiles: WideTiles | None = None, programs: int | None = None
) -> KernelSource:
    """The kernel of a product that ``takes_wide`` takes.

    Args:
        problem: the product.
        target: the device.
        tiles: that ``takes_tiles`` takes; None for the default.
        programs: that run at once; None for one a multiprocessor.
    """
    entries = _WideEntries(problem, has_pdl(target), tiles=tiles or default_wide(problem))
    variant = entries.many(programs or target.sms)
    text = HEADER + helper_text(entries.lines) + jit_text(wide_linear_kernel, entries.functions())
    if problem.norm is not None:
        text += jit_text(linear_kernel, ("_normalise",))
    text += "".join(entries.texts.values())
    return KernelSource(problem.body.name, "template", text, (variant,))


@dataclass(frozen=True, slots=True)
class _WideEpilogue(Epilogue):
    """From ``acc``, f32 [tokens, columns of each part in turn], to a store by a descriptor."""

    def lines(self) -> list[str]:
        """Those of decode linears, but for what hangs on the order of a tile's axes."""
        p, lines = self.problem, Epilogue.lines(self)
        begin = []
        if p.bias is not None:
            bias = f"tl.load({self.pointer(p.bias)} + weight_rows).to(tl.float32)[None, :]"
            begin.append(f"acc += {bias}")
        begin.append(f"acc = {rounded('acc', p.linear.dtype)}")
        if p.parts == 2:
            begin.append(f"first, second = {_SPLIT.format('acc', 'BLOCK_N')}")
        store = "out_tiles.store([first_token, strip_column], out)"
        return [*begin, *lines[len(begin) : -1], store]


@dataclass(slots=True)
class _WideEntries(_Entries):
    """The entry point for many tokens, and that of the norm."""

    tiles: WideTiles = field(kw_only=True)

    def __post_init__(self) -> None:
        names = {node: f"{name}_" for node, name in value_names(self.problem.body).items()}
        self.epilogue = _WideEpilogue(self.problem, names)
        self.lines = self.epilogue.lines()

    def functions(self) -> Sequence[str]:
        """Of the device side."""
        return ("_place", "_product", *(_SHARED if self.tiles.shared else ()))

    def many(self, programs: int) -> Variant:
        """The launches, of ``programs`` programs."""
        p, tiles, x = self.problem, self.tiles, self._rows(Hands())
        behind = {p.weight, p.bias, *(place.source for place in p.places.values())}
        inputs = [node for node in p.body.inputs if p.norm is None or node in behind]
        arguments: tuple[Argument, ...] = (*self._arguments(inputs), *x.arguments)
        spaces, counters = list(x.space), 0
        if tiles.shared:
            arguments += (
                Pointer("partial_ptr", DType.F32, "workspace", len(spaces)),
                Pointer("counter_ptr", DType.I32, "counter", 0),
            )
            # A program leaves one part at most, and fewer than two rounds of tiles are in parts.
            spaces.append((DType.F32, programs * tiles.block_m * tiles.block_n * p.parts))
            counters = 2 * programs
        name = f"{p.body.name}_of_many"
        lines = [*START_EARLY, *self._descriptors(x.text[0]), *self._loop()]
        passed = [argument.name for argument in arguments]
        self.texts[name] = kernel_text(name, str(p.body), passed, lines, _CONSTANTS)
        cut = (tiles.block_m, tiles.block_n, tiles.block_k, tiles.group)
        values = (*cut, programs, tiles.flat, self.pdl)
        constants: dict[str, Constexpr] = dict(zip(_CONSTANTS, values, strict=True))
        grid = (programs, 1, 1)
        launch = Launch(name, arguments, grid, constants, tiles.num_warps, tiles.num_stages)
        return Variant((*x.launches, launch), tuple(spaces), (), counters)

    def _descriptors(self, rows: str) -> list[str]:
        p = self.problem
        start, stride = rows.rsplit(", ", 1)
        shape, strides, block = f"{p.n}, {p.k}", f"{p.k}, 1", "BLOCK_N, BLOCK_K"
        if p.parts == 2:
            shape, strides, block = f"2, {shape}", f"{p.n * p.k}, {strides}", f"2, {block}"
        strip = f"BLOCK_N // {self.tiles.strips}"
        return [
            f"x_tiles = tl.make_tensor_descriptor({start}, [tokens, {p.k}], [{stride}, 1], "
            "[BLOCK_M, BLOCK_K])",
            f"weight_tiles = tl.make_tensor_descriptor({self._pointer(p.weight)}, [{shape}], "
            f"[{strides}], [{block}])",
            f"out_tiles = tl.make_tensor_descriptor(out_ptr, [tokens, {p.n}], [{p.n}, 1], "
            f"[BLOCK_M, {strip}])",
            f"STEPS: tl.constexpr = ({p.k} + BLOCK_K - 1) // BLOCK_K",
            f"tiles = tl.cdiv(tokens, BLOCK_M) * (({p.n} + BLOCK_N - 1) // BLOCK_N)",
        ]

    def _loop(self) -> list[str]:
        """The loop over a program's tiles, or over its pieces of tiles."""
        if not self.tiles.shared:
            return [
                "for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLAT):",
                *_indented(self._tile("0, STEPS")),
                *_indented(self._stores()),
            ]
        return [
            "rounds, start, stop, steps, sharers = _share(tiles, STEPS, PROGRAMS)",
            "turn = sharers - 1 - tl.program_id(0)",
            "pieces = rounds + tl.cdiv(stop, STEPS) - start // STEPS",
            "for index in tl.range(0, pieces, flatten=FLAT):",
            "    tile, begin, end = _piece(index, rounds, start, stop, STEPS, PROGRAMS)",
            *_indented(self._tile("begin, end")),
            "    own = tile - rounds * PROGRAMS",
            "    if begin > 0:",
            "        _leave(sums, partial_ptr, counter_ptr, own, turn)",
            "    else:",
            "        if end < STEPS:",
            "            behind = (own + 1) * STEPS",
            "            sums = _gather("
            "sums, partial_ptr, counter_ptr, own, behind, turn, steps, sharers)",
            *_indented(_indented(self._stores())),
        ]

    def _tile(self, steps: str) -> list[str]:
        """A tile's place, and its sums over some steps."""
        p = self.problem
        return [
            f"first_token, first_column = _place(tile, tokens, {p.n}, BLOCK_M, BLOCK_N, GROUP)",
            "sums = _product(x_tiles, weight_tiles, first_token, first_column, "
            f"{steps}, {p.parts}, BLOCK_M, BLOCK_N, BLOCK_K)",
        ]

    def _stores(self) -> list[str]:
        """From the sums of a tile to the stores of its strips."""
        n, strips, parts = self.problem.n, self.tiles.strips, self.problem.parts
        lines = ["token = (first_token + tl.arange(0, BLOCK_M))[:, None]"]
        strip_sums = ["sums"] if strips == 1 else ["sums_0", "sums_1"]
        if strips == 2:
            lines.append(f"sums_0, sums_1 = {_SPLIT.format('sums', 'BLOCK_N // 2')}")
        for strip in range(strips):
            width = f"BLOCK_N // {strips}"
            lines += [
                f"strip_column = first_column + {strip} * ({width})",
                f"column = (strip_column + tl.arange(0, {width}))[None, :]",
                f"acc = {strip_sums[strip]}",
            ]
            if self.problem.bias is not None:
                cell = f"tl.arange(0, {parts} * ({width}))"
                lines.append(
                    f"weight_rows = tl.minimum(strip_column + {cell} % ({width}), {n - 1}) + "
                    f"{cell} // ({width}) * {n}"
                )
            lines += self.lines
        return lines


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
