"""The launches of experts, and the entry points that they have in a kernel's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ....ir.dims import Size, call
from ....ir.dtypes import DType
from ....targets import Target
from ..generate_ops import native
from ..source import PDL, Argument, Constexpr, Launch, Pointer, Scalar, Variant, has_pdl
from .entries import entry_of
from .experts_tiles import OPERANDS, Groups, GroupTiles, Problem, Rows

_FEW, _LEAST_CHUNK = 1024, 64  # pairs that each expert's program looks at, all at once
_CHUNK = 128  # of more pairs, those that a program looks at at once
_SHARERS = 128  # programs of more pairs at most: each reads what all count
_LEAST_BINS = 32
_SUMMED = 1024  # columns of a program of the last launch


@dataclass(frozen=True, slots=True)
class _Order:
    """The launches that put pairs in order, what they find, the turns, and their workspaces."""

    launches: tuple[Launch, ...]
    found: Pointer
    turns: Pointer
    spaces: tuple[tuple[DType, Size], ...]


@dataclass(slots=True)
class Entries:
    """The entry points of a kernel's text, one for each function.

    Attributes:
        problem: what it computes.
        target: the device.
        texts: of each function that a variant launches.
    """

    problem: Problem
    target: Target
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
        """The launches made for up to ``most`` tokens, or many; right for any number."""
        p, (first, second) = self.problem, tiles
        block_m = first.block_m
        assert second.block_m == block_m, "both products have the same tiles of pairs"
        count = most_tiles(p, block_m)
        hidden_space, hidden = self._space(p.pairs * p.inner, "hidden", 0)
        result_space, results = self._space(p.pairs * p.width, "results", 1)
        tokens = Scalar("tokens", p.tokens)
        order = self._order("order", first, tokens, most)
        placed = (order.found, order.turns)
        launches = (
            *order.launches,
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
                blocks_of(first),
                first.num_warps,
                first.num_stages,
            ),
            self._launch(
                "down",
                (hidden, *placed, *self._operands("down", "down_bias"), results, tokens),
                (count * -(-p.width // second.block_n), 1, 1),
                self._matrix(4) | self._sizes("F", "K"),
                blocks_of(second),
                second.num_warps,
                second.num_stages,
            ),
            self._weighted(results),
        )
        return Variant(launches, (hidden_space, result_space, *order.spaces), guard)

    def _order(
        self,
        what: Literal["order", "places"],
        tiles: GroupTiles,
        tokens: Scalar,
        most: int | None = None,
    ) -> _Order:
        """Which pair goes where, or where each pair goes, made for up to ``most`` tokens; None:
        many. Its workspaces are the third and those behind.
        """
        p, count = self.problem, most_tiles(self.problem, tiles.block_m)
        few = what == "order" and most is not None and most * p.slots <= _FEW
        bins = max(_LEAST_BINS, power(p.experts + 1))
        sharers = call("min", -(-p.pairs // _CHUNK), _SHARERS)
        sizes: dict[str, Size] = {
            **({} if few else {"counts": sharers * bins, "starts": sharers * bins}),
            what: count * tiles.block_m if what == "order" else p.pairs,
            "turns": count + 1,
        }
        placed = {n: Pointer(n, DType.I32, "workspace", 2 + i) for i, n in enumerate(sizes)}
        ids = self._operands("ids")
        arguments: tuple[Argument, ...] = (*ids, *placed.values(), tokens)
        constants = self._ids() | self._sizes() | {"BINS": bins}
        cut: dict[str, Constexpr] = {"BLOCK_M": tiles.block_m, "GROUP": tiles.group}
        if few:
            assert most is not None
            cut["CHUNK"] = chunk = max(_LEAST_CHUNK, power(most * p.slots))
            grid, warps = (p.experts, 1, 1), max(1, chunk // 128)
            launches = [self._launch("place", arguments, grid, constants, cut, warps)]
        else:
            cut["CHUNK"], by, warps = _CHUNK, (sharers, 1, 1), _CHUNK // 32
            counted: tuple[Argument, ...] = (*ids, placed["counts"], tokens)
            launches = [
                self._launch("count", counted, by, constants, {"CHUNK": _CHUNK}, warps),
                self._launch(f"find_{what}", arguments, by, constants, cut, warps, inner="find"),
            ]
        spaces = tuple((DType.I32, size) for size in sizes.values())
        return _Order(tuple(launches), placed[what], placed["turns"], spaces)

    def _columns(self) -> int:
        """Of a program that copies or adds up rows."""
        return min(_SUMMED, max(16, power(self.problem.width)))

    def _weighted(self, results: Pointer, *places: Pointer) -> Launch:
        p, block = self.problem, self._columns()
        sizes: dict[str, Constexpr | None] = {"SLOTS": p.slots, "K": p.width}
        return self._launch(
            "weighted_rows" if places else "weighted",
            (results, *places, *self._operands("weights"), self._out()),
            (p.tokens, -(-p.width // block), 1),
            self._weights() | sizes,
            {"BLOCK_N": block},
            max(1, block // 256),
            inner="weighted",
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
        inner: str | None = None,
    ) -> Launch:
        """The launch of a function of the device side, ``inner`` or of the same name: what is alike
        in all variants stands in the text of its entry, the cut is the launch's.
        """
        inner = inner or name
        constexprs = {**cut, PDL: has_pdl(self.target)}
        launch = Launch(f"experts_{name}", arguments, grid, constexprs, num_warps, num_stages)
        given = {argument.name for argument in arguments}
        absent = {n: None for n in _ABSENT.get(inner, ()) if n not in given}
        entry = entry_of(launch, f"_{inner}", (), {**absent, **constants})
        known = self.texts.setdefault(launch.function, entry.text)
        assert known == entry.text, "variants differ in what their launches are given alone"
        return entry.launch

    def _operands(self, *names: str) -> tuple[Pointer, ...]:
        """Pointers to those of the named operands that there are."""
        args = self.problem.node.args
        found = []
        for name in names:
            index = OPERANDS.index(name)
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
    "wide_gate_up": ("gate_up_bias",),
    "wide_down": ("down_bias",),
    "wide_down_shared": ("down_bias",),
    "weighted": ("places",),
    "find": ("order", "places"),
}


def blocks_of(tiles: GroupTiles) -> dict[str, Constexpr]:
    """A cut as constants of a launch."""
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }


def most_tiles(problem: Problem, block_m: int) -> Size:
    """As ``_most_tiles`` of experts_kernel.py."""
    pairs = problem.pairs
    used = call("min", pairs, problem.experts)
    return call("floordiv", pairs + used * (block_m - 1), block_m)


def power(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(size - 1, 0).bit_length()
