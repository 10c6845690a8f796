"""What one decode product hands on to the next, so that the norm between them is no launch.

``rms_norm(h, w)`` is ``h * w``, times a number of each row that commutes with the product behind
it. So whoever makes h writes ``scaled``, which is h * w, and ``squares``, of which that number is
made; and whoever takes them scales the rows of its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....ir.dtypes import DType
from ..source import Pointer
from .linear_tiles import GemmTiles, Problem

MOST_HANDED = 64
"""Tokens of a tile up to which something is handed on. At 128 the sums that programs hold for the
norm leave them short of registers: a step of Llama-3-8B takes 0.6% longer than with launches for
its norms, at 32 and 8 it takes 0.6 and 0.3% less (one H100)."""

_GROUP = 64  # columns: their sums are a thirtieth of the bytes of x in 16 bits


@dataclass(frozen=True, slots=True)
class Hands:
    """What a product is handed, and what it hands on, in tiles of up to ``MOST_HANDED`` tokens.
    With one token, whose norm costs nothing (linear.py), and in larger tiles, neither is read nor
    written.

    The call of a product that is handed something has two more operands behind those of its node:
    ``scaled`` [T, K] in the type of x, and ``squares`` f32 [T, K / taken]. That of one that hands
    on has one more operand, the weight of the norm, behind all of these, and two more results.

    Attributes:
        taken: columns of x to each sum of squares; 0 where it is handed nothing.
        given: columns of the result to each sum of squares; 0 where it hands on nothing.
        weight: element type of the weight of the norm that it hands on to.
    """

    taken: int = 0
    given: int = 0
    weight: DType = DType.F32

    def operands(self, problem: Problem) -> tuple[Pointer, ...]:
        """Pointers to what it is handed."""
        at = len(problem.body.inputs)
        return (
            Pointer("x_scaled_ptr", problem.linear.dtype, "operand", at),
            Pointer("x_squares_ptr", DType.F32, "operand", at + 1),
        )

    def results(self, problem: Problem) -> tuple[Pointer, ...]:
        """Pointers to what it hands on, and to the weight that it needs for that."""
        if not self.given:
            return ()
        at = len(problem.body.inputs) + (2 if self.taken else 0)
        return (
            Pointer("next_norm_ptr", self.weight, "operand", at),
            Pointer("out_scaled_ptr", problem.node.dtype, "result", 1),
            Pointer("out_squares_ptr", DType.F32, "result", 2),
        )

    def lines(self, problem: Problem) -> list[str]:
        """The lines that hand on ``out``, the tile that was stored."""
        if not self.given:
            return []
        pointers = ", ".join(pointer.name for pointer in self.results(problem))
        return [f"_hand_on(out, {pointers}, column, token, tokens, {problem.n}, {self.given})"]


def group_of(problem: Problem, gemms: Sequence[GemmTiles]) -> int | None:
    """Columns to each sum of squares, so that programs of every cut write whole sums; None where
    the result's columns do not divide.
    """
    widths = [tiles.block_n for tiles in gemms if tiles.block_m <= MOST_HANDED]
    group = min([_GROUP, *widths])
    return group if widths and problem.n % group == 0 else None
