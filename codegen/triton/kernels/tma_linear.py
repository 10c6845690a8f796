"""Linears of many tokens: the product, the norm before it and the elementwise ops behind it.

As many programs as there are multiprocessors go through the tiles. The norm is a launch of its own,
and the ops behind are those of decode linears, in the same words (linear_epilogue.py).
"""

from __future__ import annotations

from ....ir.node import Node
from ....targets import Target
from ..generate_ops import rounded
from ..generate_text import helper_text, kernel_text
from ..layout import Layout
from ..source import (
    HEADER,
    PDL,
    START_EARLY,
    KernelSource,
    Launch,
    Variant,
    has_pdl,
    jit_text,
)
from . import linear_kernel, tma_linear_kernel
from .linear import _Entries
from .linear_hands import Hands
from .linear_tiles import Problem
from .tma_linear_tiles import TmaTiles, default_tma, takes_tma, tma_fits

_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "FLAT", "SPECIAL", PDL)


def emit_tma_linear(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """A kernel for a ``fused`` node of kind "linear" in float16 or bfloat16, for any number of
    tokens and cut for many.

    None for other nodes, targets without tensor descriptors, rows that do not start at multiples of
    16 bytes, and where a body holds an op that kernels lack.
    """
    problem = Problem.of(node, layouts)
    tiles = None if problem is None else default_tma(problem, target)
    if problem is None or tiles is None:
        return None
    return tma_linear_source(problem, target, tiles)


def tma_linear_source(problem: Problem, target: Target, tiles: TmaTiles) -> KernelSource | None:
    """The kernel of a problem with these tiles; None where it takes no such problem, or the tiles
    do not fit the target.
    """
    if not takes_tma(problem, target) or not tma_fits(problem, tiles, target):
        return None
    entries = _TmaEntries(problem, has_pdl(target))
    variant = entries.many(tiles, max(1, target.sms))
    text = HEADER + helper_text(entries.lines)
    own = ["_place", "_product" if problem.parts == 1 else "_products"]
    text += jit_text(tma_linear_kernel, own + (["_strips"] if tiles.strips == 2 else []))
    if problem.norm is not None:
        text += jit_text(linear_kernel, ("_normalise",))
    text += "".join(entries.texts.values())
    return KernelSource(problem.body.name, "template", text, (variant,))


class _TmaEntries(_Entries):
    """The entry points for many tokens."""

    def many(self, tiles: TmaTiles, programs: int) -> Variant:
        """The launches, of ``programs`` programs."""
        p, x = self.problem, self._rows(Hands())
        behind = {p.weight, p.bias, *(place.source for place in p.places.values())}
        inputs = [node for node in p.body.inputs if p.norm is None or node in behind]
        arguments = (*self._arguments(inputs), *x.arguments)
        name = f"{p.body.name}_of_many"
        names = [argument.name for argument in arguments]
        lines = self._many_lines(x.text[0], tiles)
        self.texts[name] = kernel_text(name, str(p.body), names, lines, _CONSTANTS)
        cut = (tiles.block_m, tiles.block_n, tiles.block_k, tiles.group)
        sizes = (*cut, tiles.flat, tiles.special, self.pdl)
        constants = dict(zip(_CONSTANTS, sizes, strict=True))
        grid = (programs, 1, 1)
        launch = Launch(name, arguments, grid, constants, tiles.num_warps, tiles.num_stages)
        return Variant((*x.launches, launch), x.space)

    def _many_lines(self, rows: str, tiles: TmaTiles) -> list[str]:
        p = self.problem
        start, stride = rows.rsplit(", ", 1)
        weight, at = self._pointer(p.weight), "x_tiles, weight_tiles, first_token, first_column"
        cut = "BLOCK_M, BLOCK_N, BLOCK_K"
        product = (
            f"acc = _product({at}, {p.k}, {cut})"
            if p.parts == 1
            else f"first, second = _products({at}, {p.n}, {p.k}, {cut})"
        )
        return [
            *START_EARLY,
            f"x_tiles = tl.make_tensor_descriptor({start}, [tokens, {p.k}], [{stride}, 1], "
            "[BLOCK_M, BLOCK_K])",
            f"weight_tiles = tl.make_tensor_descriptor({weight}, [{p.n * p.parts}, {p.k}], "
            f"[{p.k}, 1], [BLOCK_N, BLOCK_K])",
            f"tiles = tl.cdiv(tokens, BLOCK_M) * (({p.n} + BLOCK_N - 1) // BLOCK_N)",
            "for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT, "
            "warp_specialize=SPECIAL):",
            *(f"    {line}" for line in (self._place(), product, *self._stores(tiles))),
        ]

    def _place(self) -> str:
        sizes = f"tile, tokens, {self.problem.n}, BLOCK_M, BLOCK_N, GROUP"
        return f"first_token, first_column = _place({sizes})"

    def _stores(self, tiles: TmaTiles) -> list[str]:
        """From the sums of a tile to the stores of its strips."""
        n = self.problem.n
        columns = "first_column + tl.arange(0, BLOCK_N)"
        lines = [f"weight_rows = tl.minimum({columns}, {n - 1})", f"column = ({columns})[:, None]"]
        sums = ("acc",) if self.problem.parts == 1 else ("first", "second")
        if tiles.strips == 2:
            lines += [f"{name}_0, {name}_1 = _strips({name})" for name in sums]
        for strip in range(tiles.strips):
            size = f"BLOCK_M // {tiles.strips}"
            token = f"first_token + {strip} * ({size}) + tl.arange(0, {size})"
            lines += [f"token = ({token})[None, :]", f"there = (column < {n}) & (token < tokens)"]
            if tiles.strips == 2:
                lines += [f"{name} = {name}_{strip}" for name in sums]
            lines += self._behind()
        return lines

    def _behind(self) -> list[str]:
        """The epilogue's lines; where there are two halves they come as such, where the epilogue
        would split them.
        """
        p = self.problem
        if p.parts == 1:
            return self.lines
        lines = []
        for half, name in enumerate(("first", "second")):
            if p.bias is not None:
                bias = f"tl.load({self._pointer(p.bias)} + {half * p.n} + weight_rows)"
                lines.append(f"{name} += {bias}.to(tl.float32)[:, None]")
            lines.append(f"{name} = {rounded(name, p.linear.dtype)}")
        split = next(i for i, line in enumerate(self.lines) if line.startswith("first, second ="))
        return [*lines, *self.lines[split + 1 :]]
