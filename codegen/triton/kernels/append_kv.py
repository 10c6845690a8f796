"""Norms of the heads, rotary embedding and the write into a paged cache, in one launch.

A program takes a block of heads of one token, of q, k or v. It reads them where the projection
left them, mostly in one buffer; q goes to a dense one, k and v straight into their pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ....ir.dims import Size
from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.ops.quant import error_unit, tried_scales
from ....targets import Target
from ..layout import Layout, is_dense
from ..source import (
    HEADER,
    PDL,
    START_EARLY,
    Argument,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
    has_pdl,
    jit_text,
)
from . import append_kv_kernel

FP8_SINCE = 89
"""The first architecture that converts e4m3."""
SPACE: Mapping[str, tuple[int, ...]] = {
    "block_heads": (1, 2, 4, 8, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
}
"""What may be tuned, and the values to try: the fields of `Tiles`."""

_FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)
_SCALES = ("k_scale", "v_scale")
_BEHIND = ("slot_mapping", "q", "cos", "sin", "q_weight", "k_weight")
_NAMES = {
    "append_kv": ("k", "v", "k_cache", "v_cache", *_BEHIND),
    "scaled_append_kv": ("k", "v", "k_cache", "v_cache", *_SCALES, *_BEHIND),
}
_CODES = (DType.I8, DType.F8E4M3)
_ELEMENTS = 1024
_MOST_OF_A_THREAD = 32  # elements, held with their partners: more would fill the registers
_FUNCTIONS = (
    *("_inside", "_step", "_scaled", "_most", "_row_scale"),
    *("_steps", "_error", "_best_scale", "_codes_of"),
    *("_turn", "_append_kv"),
)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
        block_heads: heads that a program takes, a power of two.
        num_warps: as Triton takes it.
    """

    block_heads: int
    num_warps: int


def emit_append_kv(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """A kernel for an ``append_kv`` in float16, bfloat16, float32 or float64, or for a
    ``scaled_append_kv`` in one of these but float64.

    None where the element type is another, a number of heads or a head dim is symbolic or 0, a
    cache is a strided view, or the target has no type for the codes.
    """
    problem = Problem.of(node, layouts)
    if problem is None or (problem.codes is DType.F8E4M3 and target.arch < FP8_SINCE):
        return None
    return append_kv_source(problem, default_tiles(problem), has_pdl(target))


def append_kv_source(problem: Problem, tiles: Tiles, pdl: bool = False) -> KernelSource:
    """The kernel of a problem with these tiles; ``pdl`` as in `Launch`."""
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    blocks = sum(-(-count // tiles.block_heads) for count in heads)
    arguments, text = _entry(problem)
    launch = Launch(
        problem.name,
        arguments,
        (problem.node.args[0].shape[0], blocks, 1),  # type: ignore[union-attr]
        {"BLOCK_HEADS": tiles.block_heads, PDL: pdl},
        tiles.num_warps,
    )
    texts = (HEADER, jit_text(append_kv_kernel, _FUNCTIONS), text)
    return KernelSource(problem.name, "template", "".join(texts), (Variant((launch,)),))


def default_tiles(problem: Problem) -> Tiles:
    """1024 elements in four warps.

    For 32 + 8 heads of 128 in bfloat16 on an H100: 1.4 µs for one token, and 38 µs for 4096, 81% of
    the memory's rate. With 2 heads and one warp that was 61 µs; with 32 heads, one token took 1.5.
    """
    width = problem.width
    most = _block(max(problem.heads, problem.kv_heads))
    heads = min(max(_ELEMENTS // width, 1), most, max(SPACE["block_heads"]))
    return Tiles(heads, min(max(4 * heads * width // _ELEMENTS, 1), 4))


def fits(problem: Problem, tiles: Tiles) -> bool:
    """Whether registers hold a program's heads, on any target; so does then shared memory, through
    which neighbours change places where pairs are interleaved.
    """
    return tiles.block_heads * problem.width <= _MOST_OF_A_THREAD * 32 * tiles.num_warps


@dataclass(frozen=True, slots=True)
class Problem:
    """An ``append_kv`` that the kernel takes.

    Attributes:
        node, layouts: the call, and where its operands lie.
        heads: of q, 0 without q; ``kv_heads``: of k and v.
        head_dim, value_dim: D of q and k, E of v.
        half: number of pairs that are turned, 0 without rope.
    """

    node: Node
    layouts: tuple[Layout | None, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    half: int

    @staticmethod
    def of(node: Node, layouts: tuple[Layout | None, ...]) -> Problem | None:
        """The problem of a node, None where the kernel does not take it."""
        args = dict(zip(_NAMES[node.op], node.args, strict=True))
        places = dict(zip(_NAMES[node.op], layouts, strict=True))
        k, v, q, cos = (args[name] for name in ("k", "v", "q", "cos"))
        assert k is not None and v is not None
        for name, place in places.items():
            cache = args[name] if name.endswith(("_cache", "_scale")) else None
            if cache is not None and (place is None or not is_dense(place, cache.shape)):
                return None
        scaled = "k_scale" in args
        skipped = ("slot_mapping", "k_cache", "v_cache") if scaled else ("slot_mapping",)
        numbers = [x for name, x in args.items() if x is not None and name not in skipped]
        if any(x.dtype not in (_FLOATS[:-1] if scaled else _FLOATS) for x in numbers):
            return None
        kv_heads, head_dim, value_dim = *k.shape[1:], v.shape[2]
        heads = 0 if q is None else q.shape[1]
        half = 0 if cos is None else cos.shape[1]
        sizes = [s for s in (heads, kv_heads, head_dim, value_dim, half) if isinstance(s, int)]
        if len(sizes) < 5 or 0 in sizes[1:4]:
            return None
        return Problem(node, layouts, *sizes)

    @property
    def codes(self) -> DType | None:
        """What the caches hold, None for numbers."""
        dtype = self.node.types[0].dtype
        return dtype if dtype in _CODES else None

    @property
    def name(self) -> str:
        """What it does."""
        norm = "" if self.node.attr("eps") is None else "qknorm_"
        codes = "" if self.codes is None else "_codes"
        return f"{norm}{'rope_' if self.half else ''}append_kv{codes}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the node's operands."""
        return _NAMES[self.node.op]

    @property
    def width(self) -> int:
        """The power of two that holds a head of q, k or v."""
        return _block(max(self.head_dim, self.value_dim))

    @property
    def block_half(self) -> int:
        """Width of the tiles of first and of second members of the pairs."""
        return _block(self.half)

    @property
    def block_rest(self) -> int:
        """Width of the tile that is not turned."""
        return _block(self.head_dim - 2 * self.half)

    @property
    def block_value(self) -> int:
        """Width of a tile of v."""
        return _block(self.value_dim)


def _block(size: int) -> int:
    """The power of two that holds ``size``."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(slots=True)
class _Sizes:
    """Sizes as they stand in the text: known ones as numbers, others as arguments."""

    scalars: list[Scalar] = field(default_factory=list)

    def text(self, name: str, value: Size) -> str:
        if isinstance(value, int):
            return str(value)
        self.scalars.append(Scalar(name, value, "i64"))
        return name

    def row(self, name: str, layout: Layout, by_token: bool) -> tuple[str, list[str]]:
        """The pointer to an operand's row of the token, and the strides within it."""
        parts = [name]
        if layout.offset != 0:
            parts.append(self.text(f"{name}_offset", layout.offset))
        strides = [self.text(f"{name}_stride_{i}", s) for i, s in enumerate(layout.strides)]
        if by_token:
            parts.append(f"token * {strides.pop(0)}")
        return " + ".join(parts), strides


def _entry(problem: Problem) -> tuple[tuple[Argument, ...], str]:
    """Arguments and text of the function that is launched: it finds the rows of its token, and
    calls the shared one with all sizes filled in.
    """
    node, sizes = problem.node, _Sizes()
    pointers: list[Argument] = [
        Pointer(name, arg.dtype, "operand", index)
        for index, (name, arg) in enumerate(zip(problem.names, node.args, strict=True))
        if arg is not None
    ]
    if problem.heads:
        last = len(node.types) - 1
        pointers.append(Pointer("q_out", node.types[last].dtype, "result", last))
    passed = _rows(problem, sizes) | _constants(problem)
    passed["num_slots"] = sizes.text("num_slots", node.types[0].shape[0] * node.types[0].shape[1])
    arguments = (*pointers, *sizes.scalars)
    parameters = ", ".join(
        [*(a.name for a in arguments), "BLOCK_HEADS: tl.constexpr", f"{PDL}: tl.constexpr"]
    )
    types = ", ".join(
        f"{name} {a.type}" for name, a in zip(problem.names, node.args, strict=True) if a
    )
    lines = "".join(f"        {name}={text},\n" for name, text in passed.items())
    start = "".join(f"    {line}\n" for line in START_EARLY)
    text = (
        f"\n\n@triton.jit\ndef {problem.name}({parameters}):\n    # {types}\n"
        f"    token = tl.program_id(0).to(tl.int64)\n{start}"
        f"    _append_kv(\n{lines}        BLOCK_HEADS=BLOCK_HEADS,\n    )\n"
    )
    return arguments, text


def _rows(problem: Problem, sizes: _Sizes) -> dict[str, str]:
    """What each pointer parameter of ``_append_kv`` gets, and the strides within its row."""
    passed = {"k_cache": "k_cache", "v_cache": "v_cache", "q_out": "None"}
    passed |= {name: "None" if problem.codes is None else name for name in _SCALES}
    if problem.heads:
        passed["q_out"] = f"q_out + token * {problem.heads * problem.head_dim}"
    for name, layout in zip(problem.names, problem.layouts, strict=True):
        if name in passed:
            continue
        dims = ("head", "dim") if name in ("q", "k", "v") else ("dim",)
        pointer, strides = "None", ["0"] * len(dims)
        if layout is not None:
            pointer, strides = sizes.row(name, layout, by_token="weight" not in name)
        passed[name] = pointer
        if name != "slot_mapping":
            passed |= {f"{name}_{dim}": s for dim, s in zip(dims, strides, strict=True)}
    return passed


def _constants(problem: Problem) -> dict[str, str]:
    tries = problem.node.attr("tries")
    constants = {
        "HEADS": problem.heads,
        "KV_HEADS": problem.kv_heads,
        "DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "HALF": problem.half,
        "BLOCK_HALF": problem.block_half,
        "BLOCK_REST": problem.block_rest,
        "BLOCK_VALUE": problem.block_value,
        "INTERLEAVED": problem.node.attr("layout") == "interleaved",
        "STEPWISE": problem.node.attr("stepwise") is True,
        "EPS": problem.node.attr("eps") or 0.0,
        "TRIES": None if tries is None else tried_scales(int(str(tries))),
        "UNIT": error_unit(problem.head_dim),
        "VALUE_UNIT": error_unit(problem.value_dim),
    }
    return {name: repr(value) for name, value in constants.items()}
