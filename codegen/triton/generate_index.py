"""Index arithmetic of a generated kernel: which program takes what, and where elements lie.

Two tiles of indices run through a kernel: ``row`` [ROWS, 1] and ``cols`` [1, COLUMNS].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...ir.dims import Dim, Size, divide, product
from .generate_space import INT32_ELEMENTS, Access, Space, ceil_div, extent
from .source import Scalar

MAX_THREADS = 1024
CHUNK = 4096  # columns that a program takes at a time of a row that it cannot hold
ELEMENTWISE_COLUMNS = 1024
TILE = 1024  # elements that a program takes at least, where there are as many


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program takes.

    Attributes:
        rows, columns: powers of two.
        blocks: programs side by side along the width; 1 where each walks it all.
        chunked: whether a program walks the width in steps of ``columns``.
        num_warps: of a program.
    """

    rows: int
    columns: int
    blocks: Size
    chunked: bool
    num_warps: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What may be chosen of a tile; the rest follows.

    Attributes:
        rows, columns: of a tile, powers of two.
        num_warps: of a program.
    """

    rows: int
    columns: int
    num_warps: int

    def tile(self, space: Space, reduces: bool) -> Tile:
        """The tile over a space: a program has whole rows where something runs along them, in one
        piece or, where the columns are fewer, in steps.
        """
        whole = isinstance(space.width, int) and space.width <= self.columns
        blocks = 1 if reduces else ceil_div(space.width, self.columns)
        return Tile(self.rows, self.columns, blocks, reduces and not whole, self.num_warps)


def cut_for(space: Space, reduces: bool, elements_a_thread: int) -> Cut:
    """The cut for a space: whole rows where something runs along them, as far as registers hold
    them.
    """
    if reduces:
        columns = _reduced_columns(space.width, MAX_THREADS * elements_a_thread)
    else:
        columns = _pointwise_columns(space.width)
    rows = max(1, TILE // columns)
    if isinstance(space.rows, int):
        rows = min(rows, _power_of_two(max(1, space.rows)))
    warps = _power_of_two(max(1, rows * columns // (32 * elements_a_thread)))
    return Cut(rows, columns, min(MAX_THREADS // 32, warps))


def _reduced_columns(width: Size, widest: int) -> int:
    if not isinstance(width, int) or width > widest:
        return CHUNK
    return _power_of_two(max(1, width))


def _pointwise_columns(width: Size) -> int:
    """The largest power of two that divides the width, where it is not small: no masks then."""
    if not isinstance(width, int):
        return ELEMENTWISE_COLUMNS
    if width <= ELEMENTWISE_COLUMNS:
        whole = _power_of_two(max(1, width))
        return whole if width & -width < 64 else min(whole, width & -width)
    divisor = width & -width
    return min(divisor, ELEMENTWISE_COLUMNS) if divisor >= 256 else ELEMENTWISE_COLUMNS


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


@dataclass(slots=True)
class Indexer:
    """Turns accesses into text; remembers which sizes and which axes of the rows that takes.

    Attributes:
        space, tile: of the kernel.
        scalars: symbolic sizes by value: arguments of the kernel, i64.
    """

    space: Space
    tile: Tile
    scalars: dict[Size, str] = field(default_factory=dict)
    _axes: dict[tuple[int, int], str] = field(default_factory=dict)
    _wide_rows: bool = False
    _reads_row: bool = False

    def __post_init__(self) -> None:
        self._wide_rows = isinstance(self.space.rows, Dim)

    def size(self, size: Size, name: str = "") -> str:
        """A size as text: a literal, or the argument that holds it, called after its symbol or
        ``name``.
        """
        if isinstance(size, int):
            return str(size)
        if str(size).isidentifier():
            name = str(size)
        return self.scalars.setdefault(size, name or f"size_{len(self.scalars)}")

    def arguments(self) -> tuple[Scalar, ...]:
        """The kernel's size arguments."""
        return tuple(Scalar(name, size, "i64") for size, name in self.scalars.items())

    def element(self, found: Access, cols: str = "cols") -> str:
        """The index of an access's elements in their buffer, as a sum to stand behind a pointer."""
        reach = extent(found, self.space)
        far = not isinstance(reach, int) or reach >= INT32_ELEMENTS
        self._wide_rows |= far
        terms = [self._scaled(name, stride) for name, stride in self._row_terms(found)]
        if found.offset != 0:
            terms.append(self.size(found.offset))
        if found.cols:
            terms.append(self._scaled(self._columns(cols, found.stride), found.stride))
        return " + ".join(terms)

    def block(self, found: Access) -> str:
        """As ``element``, but a tile even where there is a single element: what stores take."""
        if found.cols or found.rows:
            return self.element(found)
        self._reads_row = True
        return "row" if found.offset == 0 else f"{self.size(found.offset)} + row"

    def mask(self, rows: bool, cols: bool) -> str:
        """Which elements of a tile exist, "" where all do."""
        names = ["in_rows"] * (rows and self.masks_rows) + ["in_cols"] * (cols and self.masks_cols)
        return " & ".join(names)

    @property
    def masks_rows(self) -> bool:
        """Whether the last program may have rows too many."""
        return divide(self.space.rows, self.tile.rows) is None

    @property
    def masks_cols(self) -> bool:
        """Whether the last columns of a tile may lie behind the width."""
        return divide(self.space.width, self.tile.columns) is None

    @property
    def grid(self) -> tuple[Size, Size, Size]:
        """Programs, all along the first axis: the others end at 65535."""
        return (ceil_div(self.space.rows, self.tile.rows) * self.tile.blocks, 1, 1)

    def preamble(self) -> Iterator[str]:
        """The lines that define the indices; asked for last, when all accesses are known."""
        row, column = self._program()
        start = f"{row}{' * ROWS' if self.tile.rows > 1 else ''} + " if row else ""
        if row or self._reads_row:
            yield f"row = {start}tl.arange(0, ROWS)[:, None]"
        for (first, stop), name in self._axes.items():
            yield f"{name} = {self._axis(first, stop)}"
        if self.masks_rows:
            yield f"in_rows = row < {self.size(self.space.rows, 'rows')}"
        if not self.tile.chunked:
            yield from self.columns(f"{column} * COLUMNS" if column else "")

    def columns(self, start: str) -> Iterator[str]:
        """The lines that define the columns from ``start`` on."""
        yield f"cols = {start + ' + ' if start else ''}tl.arange(0, COLUMNS)[None, :]"
        if self.masks_cols:
            yield f"in_cols = cols < {self.size(self.space.width, 'width')}"

    def _program(self) -> tuple[str, str]:
        """The program's number along rows and columns, "" along those that it has to itself."""
        program = "tl.program_id(0)"
        if self._wide_rows or isinstance(self.tile.blocks, Dim):
            program += ".to(tl.int64)"
        if self.tile.blocks == 1:
            return program if self.space.lead else "", ""
        if not self.space.lead:
            return "", program
        blocks = self.size(self.tile.blocks, "blocks")
        return f"({program} // {blocks})", f"({program} % {blocks})"

    def _row_terms(self, found: Access) -> Iterator[tuple[str, Size]]:
        """(index, stride) pairs: axes that lie one behind the other count as one."""
        sizes, strides = self.space.lead, found.lead
        stop = len(sizes)
        terms: list[tuple[str, Size]] = []
        while stop:
            start = stop - 1
            while start and strides[start - 1] == sizes[start] * strides[start]:
                start -= 1
            if strides[stop - 1] != 0:
                terms.append((self._axis_name(start, stop), strides[stop - 1]))
            stop = start
        yield from reversed(terms)

    def _axis_name(self, start: int, stop: int) -> str:
        if (start, stop) == (0, len(self.space.lead)):
            return "row"
        name = f"axis_{start}" if stop == start + 1 else f"axes_{start}_{stop - 1}"
        return self._axes.setdefault((start, stop), name)

    def _axis(self, start: int, stop: int) -> str:
        inner, own = product(self.space.lead[stop:]), product(self.space.lead[start:stop])
        index = "row" if inner == 1 else f"row // {self.size(inner)}"
        return index if start == 0 else f"{index} % {self.size(own)}"

    def _columns(self, cols: str, stride: Size) -> str:
        """The columns, in 64 bits where static strides take them there: symbolic ones do so."""
        width = self.space.width
        if isinstance(width, Dim) or isinstance(stride, Dim):
            return cols
        return f"{cols}.to(tl.int64)" if (width - 1) * stride >= INT32_ELEMENTS else cols

    def _scaled(self, index: str, stride: Size) -> str:
        return index if stride == 1 else f"{index} * {self.size(stride)}"
