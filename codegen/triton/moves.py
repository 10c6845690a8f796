"""Triton kernels that move elements: rotary embedding, rows into a KV cache, strided copies."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.dims import Size, total
from ...ir.dtypes import DType
from ...ir.node import Node
from ...targets import Target
from .generate_index import Indexer, cut_for
from .generate_ops import held, rounded
from .generate_space import Access, Space, access, picked, viewed, wide
from .generate_text import kernel_text, load_text
from .layout import Layout, dense
from .source import (
    HEADER,
    TRITON_TYPES,
    Argument,
    KernelSource,
    Launch,
    Pointer,
    Role,
    Variant,
)

_ELEMENTS_A_THREAD = 8


def emit_rope(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """The kernel of a ``rope``: x [..., D], cos and sin [..., R/2], computed in float32 at least.

    None for 8-bit floats.
    """
    x, cos, sin = node.operands
    half, width = cos.shape[-1], x.shape[-1]
    assert isinstance(half, int) and isinstance(width, int)
    if half == 0 or any(operand.dtype.is_float8 for operand in node.operands):
        return None
    walked = (*x.shape[:-1], half)
    index = _indexer(walked)
    source, result = _given(layouts[0]), dense(x.shape)
    step = (1, half) if node.attr("layout") == "half" else (2, 1)
    lines = [
        f"{name} = {_as_wide(load_text(f'{name}_ptr', index.element(found), mask, d.dtype), d, x)}"
        for name, d, found in (
            ("cos", cos, access(_given(layouts[1]), cos.shape, walked)),
            ("sin", sin, access(_given(layouts[2]), sin.shape, walked)),
        )
        for mask in [index.mask(found.rows, found.cols)]
    ]
    mask = index.mask(True, True)
    pair = [_part(source, walked, number * step[1], step[0]) for number in range(2)]
    turned = [_part(result, walked, number * step[1], step[0]) for number in range(2)]
    for name, found in zip("ab", pair, strict=True):
        lines.append(f"{name} = {load_text('x_ptr', index.element(found), mask, x.dtype)}")
    for text, found in zip(_turned(node), turned, strict=True):
        lines.append(_store("out_ptr", index.block(found), f"({text}){_narrowed(x)}", mask))
    lines += _rest(index, source, result, walked, 2 * half, width)
    pointers = _pointers(node, ("x", "cos", "sin"))
    return _source("rope", _about(node), index, pointers, lines)


def _turned(node: Node) -> tuple[str, str]:
    """Both members of a pair (a, b) after the turn, the last rounding left out."""
    products = [f"{part} * {table}" for part in "ab" for table in ("cos", "sin")]
    if node.attr("stepwise"):
        products = [rounded(product, node.dtype) for product in products]
    a_cos, a_sin, b_cos, b_sin = products
    return f"{a_cos} - {b_sin}", f"{b_cos} + {a_sin}"


def emit_kv_write(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """The kernel of a ``kv_write``: rows [T, G, D] into slots of a cache [N, P, G, D], in place.

    Rows whose slot is not in the cache are not written. None for a cache whose slots are not
    evenly spaced.
    """
    cache, new, slots = node.operands
    place, rows, mapping = (_given(layout) for layout in layouts)
    pages, page_size = cache.shape[:2]
    if place.strides[0] != place.strides[1] * page_size or new.dtype not in TRITON_TYPES:
        return None
    index = _indexer(new.shape)
    mask = index.mask(True, True)
    slot = picked(mapping.offset, (*mapping.strides, 0, 0), new.shape)
    target_row = picked(place.offset, (0, *place.strides[2:]), new.shape)
    inside = f"(slot >= 0) & (slot < {index.size(pages * page_size)})"
    written = " + ".join(
        filter(None, (f"slot * {index.size(place.strides[1])}", index.element(target_row)))
    )
    slot_text = load_text(
        "slot_mapping_ptr", index.element(slot), index.mask(slot.rows, False), slots.dtype
    )
    found = index.element(picked(rows.offset, rows.strides, new.shape))
    lines = [
        *_as_bytes(new, "cache_ptr", "new_ptr"),
        f"slot = {slot_text}.to(tl.int64)",
        f"new = {_raw_load('new_ptr', found, mask)}",
        _store("cache_ptr", written, "new", " & ".join(filter(None, (mask, inside)))),
    ]
    pointers = tuple(
        _pointer(name, operand, "operand", position)
        for position, (name, operand) in enumerate(
            zip(("cache", "new", "slot_mapping"), node.operands, strict=True)
        )
    )
    return _source("kv_write", _about(node), index, pointers, lines)


def emit_copy(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """The kernel that makes a ``reshape``, ``permute``, ``expand``, ``slice`` or ``concat`` dense.

    None for complex numbers.
    """
    if node.dtype not in TRITON_TYPES:
        return None
    starts = _starts(node)
    parts = [
        _copied(node, operand, _given(layout), start)
        for operand, layout, start in zip(node.operands, layouts, starts, strict=True)
    ]
    functions, launches = [], []
    for position, (shape, read, written) in enumerate(parts):
        name = f"{node.op}_copy" + (f"_{position}" if len(parts) > 1 else "")
        index = _indexer(shape)
        pointers = (
            _pointer("x", node, "operand", position),
            _pointer("out", node, "result", 0),
        )
        mask = index.mask(True, True)
        lines = [
            *_as_bytes(node, "x_ptr", "out_ptr"),
            f"x = {_raw_load('x_ptr', index.block(read), mask)}",
            _store("out_ptr", index.block(written), "x", mask),
        ]
        text, launch = _function(name, _about(node), index, pointers, lines)
        functions.append(text)
        launches.append(launch)
    text = HEADER + "".join(functions)
    return KernelSource(f"{node.op}_copy", "generated", text, (Variant(tuple(launches)),))


def _starts(node: Node) -> list[Size]:
    """Where each operand begins in the result: 0, but for those of a concat."""
    if node.op != "concat":
        return [0]
    dim = node.attr("dim")
    assert isinstance(dim, int)
    before = [[o.shape[dim] for o in node.operands[:i]] for i in range(len(node.operands))]
    stride = dense(node.shape).strides[dim]
    return [total(sizes) * stride for sizes in before]


def _copied(
    node: Node, operand: Node, layout: Layout, start: Size
) -> tuple[tuple[Size, ...], Access, Access]:
    """The shape that a copy walks, where it reads and where it writes."""
    moved: Layout | None
    if node.op == "concat":
        shape, moved = operand.shape, layout
        strides = dense(node.shape).strides
    else:
        shape, moved = node.shape, viewed(node, layout)
        if moved is None:  # a reshape keeps the order of elements: it may walk its operand's shape
            shape, moved = operand.shape, layout
        strides = dense(shape).strides
    if not shape:
        return (1,), Access(moved.offset, (), 0), Access(start, (), 0)
    return shape, picked(moved.offset, moved.strides, shape), picked(start, strides, shape)


def _indexer(shape: Sequence[Size]) -> Indexer:
    space = Space(wide(shape[:-1]), shape[-1])
    return Indexer(space, cut_for(space, False, _ELEMENTS_A_THREAD).tile(space, False))


def _part(layout: Layout, walked: Sequence[Size], start: int, step: int) -> Access:
    """Every ``step``-th element of the last axis from ``start`` on."""
    last = layout.strides[-1]
    return picked(layout.offset + last * start, (*layout.strides[:-1], last * step), walked)


def _rest(
    index: Indexer, source: Layout, result: Layout, walked: Sequence[Size], start: int, width: int
) -> list[str]:
    """The lines that copy what lies behind the rotated part."""
    if start == width:
        return []
    shape = (*walked[:-1], width - start)
    read, written = _part(source, shape, start, 1), _part(result, shape, start, 1)
    columns = 1 << (width - start - 1).bit_length()
    masks = [index.mask(True, False)]
    if columns != width - start:
        masks.append(f"(rest < {width - start})")
    mask = " & ".join(filter(None, masks))
    load = _raw_load("x_ptr", index.element(read, "rest"), mask)
    return [
        f"rest = tl.arange(0, {columns})[None, :]",
        _store("out_ptr", index.element(written, "rest"), load, mask),
    ]


def _as_wide(text: str, operand: Node, x: Node) -> str:
    """An operand in the type that x is computed in."""
    same = held(operand.dtype) == held(x.dtype)
    return text if same else f"{text}.to({held(x.dtype)})"


def _narrowed(node: Node) -> str:
    name = {"bf16": ".to(tl.bfloat16)", "f16": ".to(tl.float16)"}
    return name.get(str(node.dtype), "")


def _as_bytes(node: Node, *pointers: str) -> list[str]:
    """The lines that make pointers to 8-bit floats pointers to bytes: older targets lack the type.
    Compiled kernels are given such pointers already, the interpreter has the tensors' own.
    """
    if not node.dtype.is_float8:
        return []
    return [f"{name} = {name}.to(tl.pointer_type(tl.uint8))" for name in pointers]


def _raw_load(pointer: str, element: str, mask: str) -> str:
    address = f"{pointer} + {element}" if element else pointer
    return f"tl.load({address}{f', mask={mask}' if mask else ''})"


def _store(pointer: str, element: str, value: str, mask: str) -> str:
    masked = f", mask={mask}" if mask else ""
    return f"tl.store({pointer} + {element}, {value}{masked})"


def _pointer(name: str, node: Node, role: Role, position: int) -> Pointer:
    dtype = DType.U8 if node.dtype.is_float8 else node.dtype
    return Pointer(f"{name}_ptr", dtype, role, position)


def _given(layout: Layout | None) -> Layout:
    assert layout is not None
    return layout


def _about(node: Node) -> str:
    operands = ", ".join(str(operand.type) for operand in node.operands)
    attrs = "".join(f", {name}={value}" for name, value in node.attrs)
    return f"{node.type} = {node.op}({operands}{attrs})"


def _pointers(node: Node, names: Sequence[str]) -> tuple[Pointer, ...]:
    operands = (
        _pointer(name, operand, "operand", position)
        for position, (name, operand) in enumerate(zip(names, node.operands, strict=True))
    )
    return (*operands, _pointer("out", node, "result", 0))


def _function(
    name: str, about: str, index: Indexer, pointers: tuple[Pointer, ...], lines: Sequence[str]
) -> tuple[str, Launch]:
    body = [*index.preamble(), *lines]
    arguments: tuple[Argument, ...] = (*pointers, *index.arguments())
    tile = index.tile
    text = kernel_text(name, about, [argument.name for argument in arguments], body)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    return text, Launch(name, arguments, index.grid, constants, num_warps=tile.num_warps)


def _source(
    name: str, about: str, index: Indexer, pointers: tuple[Pointer, ...], lines: Sequence[str]
) -> KernelSource:
    text, launch = _function(name, about, index, pointers, lines)
    return KernelSource(name, "generated", HEADER + text, (Variant((launch,)),))
