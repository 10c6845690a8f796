"""Experts of many pairs each: tiles of them all by tensor descriptors (TMA), in programs that stay.

Descriptors take dense rows, so those of x are written in the order of their experts first, and each
token's results are found by their places in the end. Between, as many programs as multiprocessors
hold go through the tiles of pairs and the blocks of columns: the list of tiles is made on the GPU,
and its length is read there. Gates and ups are one product, as in wide_linear.py, so that what
``down`` takes is all that is written of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....ir.dims import Size
from ....ir.dtypes import DType
from ..source import Constexpr, Launch, Pointer, Scalar, Variant
from .experts_entries import Entries, blocks_of, most_tiles
from .experts_tiles import PRODUCTS, Groups, Product
from .wide_experts_tiles import WideTiles, resident

SHARED_FUNCTIONS = ("_share", "_piece", "_halves", "_cells", "_leave", "_gather")
WIDE_FUNCTIONS = ("_spread", "_wide_sums", "_wide_gate_up", "_wide_down", "_wide_down_shared")


@dataclass(slots=True)
class WideEntries(Entries):
    """The entry points of all forms."""

    def in_any_groups(self, tiles: Groups, most: int | None, guard: tuple[Size, ...]) -> Variant:
        """The launches of many tokens, in the form of their tiles; see ``in_groups``."""
        first, second = tiles
        if isinstance(first, WideTiles):
            assert isinstance(second, WideTiles), "one order of rows for both products"
            return self.in_wide_groups(first, second, guard)
        return self.in_groups(tiles, most, guard)

    def in_wide_groups(
        self, first: WideTiles, second: WideTiles, guard: tuple[Size, ...]
    ) -> Variant:
        """Those by descriptors, gate_up cut as ``first`` says and down as ``second``."""
        p, block_m = self.problem, first.block_m
        assert second.block_m == block_m, "both products have the same tiles of pairs"
        count = most_tiles(p, block_m)
        rows = count * block_m
        hidden_space, hidden = self._space(rows * p.inner, "hidden", 0)
        # What gate_up takes and what down gives never live at one time.
        row_space, x = self._space(rows * p.width, "x", 1)
        _, sorted_x = self._space(rows * p.width, "sorted_x", 1)
        _, results = self._space(rows * p.width, "results", 1)
        tokens = Scalar("tokens", p.tokens)
        order = self._order("places", first, tokens)
        places, turns = order.found, order.turns
        biased = (self._operands("gate_up", "gate_up_bias"), self._operands("down", "down_bias"))
        parts = (
            Pointer("partial", DType.F32, "workspace", 2 + len(order.spaces)),
            Pointer("counters", DType.I32, "counter", 0),
        )[: 2 * second.shared]
        launches = (
            *order.launches,
            self._spread(places, sorted_x),
            self._product("gate_up", first, (x, turns, *biased[0], hidden, tokens)),
            self._product("down", second, (hidden, turns, *biased[1], results, *parts, tokens)),
            self._weighted(results, places),
        )
        spaces = [hidden_space, row_space, *order.spaces]
        counters = 0
        if second.shared:
            programs = self._programs("down", second)
            # A program leaves one part at most, and fewer than two rounds of tiles are in parts.
            spaces.append((DType.F32, programs * block_m * second.block_n))
            counters = 2 * programs
        return Variant(launches, tuple(spaces), guard, counters)

    def _spread(self, places: Pointer, sorted_x: Pointer) -> Launch:
        p, block = self.problem, self._columns()
        sizes: dict[str, Constexpr | None] = {"SLOTS": p.slots, "K": p.width}
        return self._launch(
            "spread",
            (*self._operands("x"), places, sorted_x),
            (p.tokens, -(-p.width // block), 1),
            self._x() | sizes,
            {"BLOCK_N": block},
            max(1, block // 256),
        )

    def _product(
        self, product: Product, tiles: WideTiles, arguments: tuple[Pointer | Scalar, ...]
    ) -> Launch:
        programs = self._programs(product, tiles)
        rows = self._rows_of(3 + PRODUCTS.index(product))
        if product == "gate_up":
            del rows["W_EXPERT"]
        flat: dict[str, Constexpr] = {} if tiles.shared else {"FLAT": tiles.flat}
        return self._launch(
            f"wide_{product}" + "_shared" * tiles.shared,
            arguments,
            (programs, 1, 1),
            rows | self._sizes("F", "K") | (self._act() if product == "gate_up" else {}),
            {**blocks_of(tiles), "PROGRAMS": programs, **flat},
            tiles.num_warps,
            tiles.num_stages,
        )

    def _programs(self, product: Product, tiles: WideTiles) -> int:
        return self.target.sms * resident(self.problem, product, tiles, self.target)
