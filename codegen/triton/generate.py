"""Triton kernels for fused groups: each body becomes one readable function, a line an IR node.

    @triton.jit
    def add_rms_norm_7f15(a_ptr, b_ptr, weight_ptr, out0_ptr, out1_ptr, ROWS, COLUMNS):
        row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
        cols = tl.arange(0, COLUMNS)[None, :]
        a = tl.load(a_ptr + row * 4096 + cols).to(tl.float32)
        b = tl.load(b_ptr + row * 4096 + cols).to(tl.float32)
        weight = tl.load(weight_ptr + cols).to(tl.float32)
        add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
        tl.store(out0_ptr + row * 4096 + cols, add_0.to(tl.bfloat16))
        rms_norm_0_squares = tl.sum(add_0 * add_0, 1, keep_dims=True)
        …

Values are rounded to their declared type after each op, so that fusing them changes no bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...ir.dims import Dim
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.ops.control import body_of
from ...ir.printer import value_names
from ...targets import Target
from .cuts import Cuts
from .generate_index import Cut, Indexer, cut_for
from .generate_ops import TRITON_NAMES, constant_of, elementwise, held, operand
from .generate_reads import Read, Reads, members_of, picks_rows, resolve
from .generate_rows import Row, Value, point, row_steps
from .generate_space import INT32_ELEMENTS, ROW_OPS, Access, Space, dense_access, space_of
from .generate_steps import Step, in_chunks, in_one_tile
from .generate_text import function_text, load_text
from .layout import Layout
from .source import (
    PDL,
    START_EARLY,
    Argument,
    KernelSource,
    Launch,
    Pointer,
    Variant,
    has_e4m3,
    has_pdl,
)

# Names that a kernel's text gives a meaning of its own.
_TAKEN = re.compile(
    "row|cols|in_rows|in_cols|start|range|float|tl|triton|rows|width|blocks"
    r"|size_\d+|axis_\d+|axes_\d+_\d+|const_\d+|out\d+"
)
_MANY_OPERANDS = 4


@dataclass(frozen=True, slots=True)
class Walk:
    """A ``fused`` node that has a generated kernel: what its text depends on, apart from the cut.

    Attributes:
        body: its graph.
        members: what computes something, in order.
        space: that all of them run over.
        reads: where each finds its operands.
    """

    body: Graph
    members: tuple[Node, ...]
    space: Space
    reads: Reads

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Walk | None:
        """The walk of a node, None where generated kernels do not take it."""
        body = body_of(node)
        members = members_of(body)
        space = space_of(members)
        if space is None or not _fits(body, members, space):
            return None
        reads = resolve(body, members, layouts, space)
        if reads is None or not all(_has_text(member) for member in members):
            return None
        return cls(body, tuple(members), space, reads)

    @property
    def reduces(self) -> bool:
        """Whether something runs along the rows."""
        return any(member.op in ROW_OPS for member in self.members)

    @property
    def has_e4m3(self) -> bool:
        """Whether something is rounded to 8-bit floats, or made of them."""
        return any(t.dtype is DType.F8E4M3 for node in self.body.nodes for t in node.types)

    @property
    def default(self) -> Cut:
        """The cut without tuning."""
        few = len(self.body.inputs) < _MANY_OPERANDS
        return cut_for(self.space, self.reduces, 16 if self.reduces and few else 8)


def emit_fused(
    node: Node,
    layouts: tuple[Layout | None, ...],
    target: Target,
    cuts: Cuts | None = None,
) -> KernelSource | None:
    """The kernel of a ``fused`` node of any kind, cut as ``cuts`` says.

    None for what it does not take: complex numbers, 8-bit floats that the target lacks, members
    that do not share one space of rows times width, sizes beyond 32 bits along an axis.
    """
    walk = Walk.of(node, layouts)
    if walk is None or (walk.has_e4m3 and not has_e4m3(target)):
        return None
    cut = None if cuts is None else cuts.walk(node)
    return walk_source(walk, cut or walk.default, target)


def walk_source(walk: Walk, cut: Cut, target: Target) -> KernelSource:
    """The kernel of a walk with this cut."""
    return _Kernel(walk, cut).source(has_pdl(target))


def _fits(body: Graph, members: Sequence[Node], space: Space) -> bool:
    reduces = any(member.op in ROW_OPS for member in members)
    if space.width == 0 and reduces:
        return False
    sizes = (space.rows, space.width)
    if any(not isinstance(size, Dim) and size >= INT32_ELEMENTS for size in sizes):
        return False
    typed = all(t.dtype in TRITON_NAMES for node in body.nodes for t in node.types)
    return typed and all(output in members for output in body.outputs)


def _has_text(node: Node) -> bool:
    if node.op in ROW_OPS or picks_rows(node):
        return True
    return elementwise(node, ["x"] * len(node.operands)) is not None


class _Kernel:
    def __init__(self, walk: Walk, cut: Cut) -> None:
        self.body, self.members = walk.body, walk.members
        self.space, self.reads = walk.space, walk.reads
        self.index = Indexer(walk.space, cut.tile(walk.space, walk.reduces))
        self.names = {
            node: f"{name}_" if _TAKEN.fullmatch(name) else name
            for node, name in value_names(walk.body).items()
        }
        self.steps: list[Step] = []
        self.values: dict[Node, Value] = {}
        self.loaded: dict[tuple[Node, Access], Value] = {}

    def source(self, pdl: bool) -> KernelSource:
        for member in self.members:
            self._compute(member)
            for number, output in enumerate(self.body.outputs):
                if output is member:
                    self._store(member, f"out{number}")
        name, tile = self.body.name, self.index.tile
        lines = self._lines()
        arguments: tuple[Argument, ...] = (*self._pointers(), *self.index.arguments())
        constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, PDL: pdl}
        names = [argument.name for argument in arguments]
        text = function_text(name, str(self.body), names, lines, tuple(constants))
        launch = Launch(name, arguments, self.index.grid, constants, num_warps=tile.num_warps)
        return KernelSource(name, "generated", text, (Variant((launch,)),))

    def _lines(self) -> list[str]:
        if self.index.tile.chunked:
            width = self.index.size(self.space.width, "width")
            body = list(in_chunks(self.steps, width, list(self.index.columns("start"))))
        else:
            body = list(in_one_tile(self.steps))
        return [*START_EARLY, *self.index.preamble(), *body]

    def _pointers(self) -> tuple[Pointer, ...]:
        operands = (
            Pointer(f"{self.names[node]}_ptr", node.dtype, "operand", position)
            for position, node in enumerate(self.body.inputs)
        )
        results = (
            Pointer(f"out{position}_ptr", node.dtype, "result", position)
            for position, node in enumerate(self.body.outputs)
        )
        return (*operands, *results)

    def _compute(self, node: Node) -> None:
        name = self.names[node]
        if picks_rows(node):
            self.values[node] = self._picked(node, name)
        elif node.op in ROW_OPS:
            args = tuple(self._variable(node, position) for position in range(len(node.args)))
            self.steps += row_steps(node, name, args, self._row())
            self.values[node] = Value(name, node.dtype, self.steps[-1].cols)
        else:
            self._pointwise(node, name)

    def _pointwise(self, node: Node, name: str) -> None:
        texts, used = [], []
        for position in range(len(node.args)):
            read = self.reads[node, position]
            if read.source.op == "const":
                texts.append(operand(node, read.source))
            else:
                value = self._variable(node, position)
                assert value is not None
                texts.append(value.name)
                used.append(value)
        text = elementwise(node, texts)
        assert text is not None
        step, self.values[node] = point(name, text, node.dtype, used)
        self.steps.append(step)

    def _row(self) -> Row:
        width = self.space.width
        return Row(self.index.size(width, "width"), width, self.index.masks_cols)

    def _variable(self, node: Node, position: int) -> Value | None:
        """The variable that holds an operand, loaded if need be; None for an absent operand."""
        read = self.reads.get((node, position))
        if read is None:
            return None
        if read.access is None:
            return self.values.get(read.source) or self._constant(read.source)
        arg = node.args[position]
        assert arg is not None
        key = (read.source, read.access)
        if key not in self.loaded:
            self.loaded[key] = self._load(read, self.names[arg])
        return self.loaded[key]

    def _constant(self, const: Node) -> Value:
        name = f"const_{len(self.steps)}"
        step, made = point(name, constant_of(const), const.dtype, ())
        self.steps.append(step)
        return made

    def _load(self, read: Read, name: str) -> Value:
        assert read.access is not None
        name = self._free(name)
        mask = self.index.mask(read.access.rows, read.access.cols)
        text = self._load_text(read, self.index.element(read.access), mask)
        value = Value(name, read.source.dtype, read.access.cols)
        self.steps.append(Step(name, text, (), value.cols, load=True))
        return value

    def _picked(self, node: Node, name: str) -> Value:
        """Rows of a table. An index out of range, which torch refuses, reads a row that exists."""
        ids, read = self._variable(node, 1), self.reads[node, 0]
        assert ids is not None and read.access is not None and read.table is not None
        found = self.reads[node, 1].access
        assert found is not None
        count, stride = read.table
        last = f"{self.index.size(count)} - 1" if isinstance(count, Dim) else str(count - 1)
        clamped = f"tl.minimum(tl.maximum({ids.name}.to(tl.int64), 0), {last})"
        step, row = point(f"{name}_row", clamped, ids.dtype, (ids,))
        self.steps.append(step)
        element = self.index.element(read.access)
        picked = f"{row.name} * {self.index.size(stride)}" + (f" + {element}" if element else "")
        masks = [self.index.mask(found.rows or read.access.rows, found.cols or read.access.cols)]
        if isinstance(count, Dim):
            masks.append(f"({self.index.size(count)} > 0)")  # else there is no row to read
        text = self._load_text(read, picked, " & ".join(filter(None, masks)))
        cols = ids.cols or read.access.cols
        self.steps.append(Step(name, text, (row.name,), cols, load=True))
        return Value(name, node.dtype, cols)

    def _load_text(self, read: Read, element: str, mask: str) -> str:
        pointer = f"{self.names[read.source]}_ptr"
        return load_text(pointer, element, mask, read.source.dtype)

    def _store(self, node: Node, name: str) -> None:
        value = self.values[node]
        found = dense_access(node.shape, self.space)
        mask = self.index.mask(found.rows, found.cols)
        narrow = TRITON_NAMES[node.dtype]
        text = value.name if held(node.dtype) == narrow else f"{value.name}.to({narrow})"
        masked = f", mask={mask}" if mask else ""
        element = self.index.block(found)
        self.steps.append(
            Step("", f"tl.store({name}_ptr + {element}, {text}{masked})", (value.name,), found.cols)
        )

    def _free(self, name: str) -> str:
        used = {value.name for value in self.loaded.values()}
        return next(n for n in _numbered(name) if n not in used)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 1
    while True:
        yield f"{name}_at_{number}"
        number += 1
