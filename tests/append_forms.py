"""append_kv for tests: every form as a node, buffers full of noise, and what must stand in them
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tilewright.codegen.triton.kernels.append_kv import (
    Problem,
    Tiles,
    append_kv_source,
    default_tiles,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make, permute, reshape
from tilewright.ir.dims import Size, evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.schema import TOLERANCE, schema
from tilewright.ir.types import TensorType

T, N, P = map(symbol, "TNP")
PAGES, PAGE = 4, 4
REFERENCE = schema("append_kv").reference


@dataclass(frozen=True)
class Form:
    """What is static in a call. ``rows`` says where q, k and v lie: in buffers of their own, as
    slices of one product, in parts of each head, or with the heads first.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    half: int = 8
    layout: str = "half"
    dtype: DType = DType.F32
    tables: DType = DType.F32
    weights: DType = DType.F32
    q_norm: bool = False
    k_norm: bool = False
    rows: str = "merged"
    slots: DType = DType.I64
    steps: bool = False
    codes: DType | None = None
    tries: int | None = None

    @property
    def op(self) -> str:
        return "append_kv" if self.codes is None else "scaled_append_kv"

    @property
    def has_q(self) -> bool:
        return self.half > 0 or self.q_norm

    @property
    def stepwise(self) -> bool:
        """Whether the op can be: it does something, in one element type."""
        alike = self.tables is self.dtype or not self.half
        alike = alike and (self.weights is self.dtype or not (self.q_norm or self.k_norm))
        return self.steps and alike and (self.half > 0 or self.q_norm or self.k_norm)


def tensor(name: str, dtype: DType, *shape: Size) -> Node:
    return input_node(name, TensorType(dtype, shape))


def rows_of(form: Form) -> list[Node]:
    """q, k and v."""
    widths = {"q": form.head_dim, "k": form.head_dim, "v": form.value_dim}
    heads = {"q": form.heads, "k": form.kv_heads, "v": form.kv_heads}
    total = sum(heads[name] * width for name, width in widths.items())
    merged = tensor("qkv", form.dtype, T, total)
    found, start = [], 0
    for name, width in widths.items():
        count = heads[name]
        if form.rows == "own":
            x = tensor(name, form.dtype, T, count, width)
        elif form.rows == "heads first":
            x = permute(tensor(name, form.dtype, count, width, T), 2, 0, 1)
        elif form.rows == "by head":
            x = make(
                "slice",
                tensor(name, form.dtype, T, count, 2 * width),
                dim=2,
                start=width,
                stop=2 * width,
            )
        else:
            x = make("slice", merged, dim=1, start=start, stop=start + count * width)
            x = reshape(x, T, count, width)
        start += count * width
        found.append(x)
    return found


def call(form: Form) -> Node:
    """The call's node, over symbols T, N and P."""
    q, k, v = rows_of(form)
    held = form.codes or form.dtype
    caches = [
        tensor("k_cache", held, N, P, form.kv_heads, form.head_dim),
        tensor("v_cache", held, N, P, form.kv_heads, form.value_dim),
    ]
    if form.codes is not None:
        caches += [tensor(f"{x}_scale", DType.F32, N, P, form.kv_heads, 1) for x in "kv"]
    table = tensor("table", form.tables, T, 2 * form.half)  # cos and sin side by side
    cos, sin = (
        make("slice", table, dim=1, start=i * form.half, stop=(i + 1) * form.half) for i in range(2)
    )
    weights = [tensor(name, form.weights, form.head_dim) for name in ("q_weight", "k_weight")]
    tried = {"tries": form.tries} if form.codes is DType.F8E4M3 else {}
    return make(
        form.op,
        *(k, v, *caches, tensor("slots", form.slots, T)),
        q if form.has_q else None,
        *((cos, sin) if form.half else (None, None)),
        weights[0] if form.has_q and form.q_norm else None,
        weights[1] if form.k_norm else None,
        layout=form.layout if form.half else "half",
        eps=1e-5 if form.k_norm or (form.has_q and form.q_norm) else None,
        stepwise=True if form.stepwise else None,
        **tried,
    )


def problem_of(node: Node) -> Problem | None:
    return Problem.of(node, tuple(None if arg is None else located(arg)[1] for arg in node.args))


def source_of(node: Node, tiles: Tiles | None = None, pdl: bool = False) -> KernelSource:
    problem = problem_of(node)
    assert problem is not None
    return append_kv_source(problem, tiles or default_tiles(problem), pdl)


def any_bits(type_: TensorType, sizes: Mapping[str, int]) -> torch.Tensor:
    """Random bytes, NaN among them."""
    shape = [evaluate(size, sizes) for size in type_.shape]
    noise = torch.randint(0, 256, (*shape[:-1], shape[-1] * type_.dtype.bytes))
    return noise.to(torch.uint8).view(type_.dtype.torch)


def sizes_of(slots: Sequence[int]) -> dict[str, int]:
    """The value of each symbol."""
    return {"T": len(slots), "N": PAGES, "P": PAGE}


def buffers_of(node: Node, slots: Sequence[int]) -> dict[Node, torch.Tensor]:
    """A tensor for each buffer that the operands lie in."""
    sizes = sizes_of(slots)
    found = {}
    for base in dict.fromkeys(located(arg)[0] for arg in node.operands):
        shape = [evaluate(size, sizes) for size in base.shape]
        if N in base.shape:
            found[base] = any_bits(base.type, sizes)
        elif base.dtype.is_integer:
            found[base] = torch.tensor(slots).to(base.dtype.torch)
        else:
            found[base] = torch.randn(shape, dtype=torch.float64).to(base.dtype.torch)
    return found


def assert_appended(
    form: Form,
    slots: Sequence[int],
    before: Mapping[Node, torch.Tensor],
    found: Sequence[torch.Tensor],
) -> None:
    """A kernel's results, on the CPU: the rows of the reference in the slots that there are, q for
    all tokens, and each other byte of the caches as it was ``before``.
    """
    node, count = call(form), len(slots)
    viewed = interpret(Graph("g", (*before,), node.operands), [*before.values()])
    values = dict(zip(node.operands, viewed, strict=True))
    operands = [None if arg is None else values[arg] for arg in node.args]
    # A cache of one page, large enough for all, shows the rows; the op refuses slots outside.
    end = 4 if form.codes is None else 6
    page = [cache.new_zeros(1, count, *cache.shape[2:]) for cache in operands[2:end]]
    rest = operands[end + 1 :]
    reference = schema(form.op).reference
    wanted = reference(*operands[:2], *page, torch.arange(count), *rest, **dict(node.attrs))
    there = [t for t, slot in enumerate(slots) if 0 <= slot < PAGES * PAGE]
    written = torch.zeros(PAGES * PAGE, dtype=torch.bool)
    written[[slots[t] for t in there]] = True
    for index, (cache, old, rows) in enumerate(
        zip(found[: end - 2], operands[2:end], wanted[: end - 2], strict=True)
    ):
        got, was = (rows_of_slots(x) for x in (cache, old))
        assert torch.equal(bits(got[~written]), bits(was[~written]))
        mine, theirs = got[[slots[t] for t in there]], rows_of_slots(rows)[there]
        normed = form.k_norm and index % 2 == 0
        if not (normed and form.codes):
            same(*(x.flatten().view(rows.dtype) for x in (mine, theirs)), normed)
    if form.k_norm and form.codes:
        mine = numbers(found[0], found[2])
        near([mine[slots[t]] for t in there], numbers(wanted[0], wanted[2])[there])
    if form.has_q:
        same(found[-1], wanted[-1], form.q_norm)


def rows_of_slots(cache: torch.Tensor) -> torch.Tensor:
    """The bytes of a cache by slot: torch picks no rows of 8-bit floats."""
    return cache.flatten(0, 1).contiguous().flatten(1).view(torch.uint8)


def numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the rows of codes stand for, by slot."""
    return (codes.float() * scales).flatten(0, 1)


def near(rows: list[torch.Tensor], wanted: torch.Tensor) -> None:
    """Rows are those wanted, but for a step from one code to the next, and for the last bit of the
    16 that they had before: torch adds up squares in another order.
    """
    for row, truth in zip(rows, wanted, strict=True):
        top = truth.abs().amax(-1, keepdim=True)
        assert ((row - truth).abs() <= truth.abs() / 7 + top / 60).all()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def same(found: torch.Tensor, wanted: torch.Tensor, normed: bool) -> None:
    """Equal bits; where sums come in another order than torch's, within the op's tolerance."""
    if not normed:
        assert torch.equal(bits(found), bits(wanted))
        return
    rtol, atol = TOLERANCE[DType.from_torch(wanted.dtype)]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


FLOATS = (DType.F32, DType.BF16, DType.F16)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    dim = draw(st.sampled_from([1, 2, 6, 16, 20, 64, 80]))
    dtype = draw(st.sampled_from([*FLOATS, DType.F64]))
    return Form(
        heads=draw(st.integers(1, 9)),
        kv_heads=draw(st.integers(1, 5)),
        head_dim=dim,
        value_dim=draw(st.sampled_from([dim, 24])),
        half=draw(st.integers(0, dim // 2)),
        layout=draw(st.sampled_from(["half", "interleaved"])),
        dtype=dtype,
        tables=draw(st.sampled_from([dtype, *FLOATS])),
        weights=draw(st.sampled_from([dtype, *FLOATS])),
        q_norm=draw(st.booleans()),
        k_norm=draw(st.booleans()),
        rows=draw(st.sampled_from(["merged", "own", "heads first", "by head"])),
        slots=draw(st.sampled_from([DType.I64, DType.I32])),
        steps=draw(st.booleans()),
    )


@st.composite
def slot_lists(draw: st.DrawFn) -> list[int]:
    """Distinct slots of the cache, and some below and beyond it."""
    end = PAGES * PAGE
    there = draw(st.lists(st.integers(0, end - 1), max_size=4, unique=True))
    outside = draw(st.lists(st.sampled_from([-1, -end, end, end + 1, 2**31 - 1]), max_size=2))
    return draw(st.permutations(there + outside))
