"""Paged attention for tests, ragged and of one token a sequence, over numbers and over codes:
nodes, buffers in which all that must not be read is poisoned, and what they give in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tilewright.codegen.triton.layout import Layout, located
from tilewright.ir.build import input_node, make, permute
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

OP = schema("paged_attention")
OUTSIDE = 1 << 30  # a page id that no cache has
Operands = list[torch.Tensor | None]


@dataclass(frozen=True)
class Shape:
    """What is static in a call; the page size is where ``paged`` says so. The ``first`` keys are
    seen from beyond a window.
    """

    group: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    page: int = 4
    paged: bool = False
    dtype: DType = DType.F32
    sinks: bool = False
    alibi: bool = False
    strided: bool = False
    codes: DType | None = None
    first: int = 0

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


def ragged_call(shape: Shape, sizes: Mapping[str, Size] | None = None, **attrs) -> Node:
    """The call over ragged tokens: T, B, M, N and P are symbols where neither ``sizes`` nor the
    shape knows them.
    """
    known = _sizes(shape, sizes)
    return _call(shape, known, known["T"], known["B"] + 1, **attrs)


def decode_call(shape: Shape, sizes: Mapping[str, Size] | None = None, **attrs) -> Node:
    """The call over one token of each sequence, as ``ragged_call`` otherwise."""
    known = _sizes(shape, sizes)
    return _call(shape, known, known["B"], None, **attrs)


def _sizes(shape: Shape, sizes: Mapping[str, Size] | None) -> dict[str, Size]:
    static = {"P": shape.page} if shape.paged else {}
    return {name: symbol(name) for name in "TBMNP"} | static | dict(sizes or {})


def _call(
    shape: Shape, sizes: Mapping[str, Size], rows: Size, starts: Size | None, **attrs
) -> Node:
    B, M, N, P = (sizes[name] for name in "BMNP")
    H, G, D, E = shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim

    def tensor(name: str, *size: Size, dtype: DType = shape.dtype) -> Node:
        return input_node(name, TensorType(dtype, size))

    q = tensor("q", rows, H, D)
    if shape.strided:  # queries are a part of a wider row, head dim first
        wide = tensor("q", rows, D, H + 3)
        q = permute(make("slice", wide, dim=2, start=2, stop=H + 2, step=1), 0, 2, 1)
    scaled = shape.codes is not None
    held = shape.codes or shape.dtype
    scales = [tensor(f"{name}_scale", N, P, G, 1, dtype=DType.F32) for name in "kv"]
    return make(
        "scaled_paged_attention" if scaled else "paged_attention",
        q,
        tensor("k", N, P, G, D, dtype=held),
        tensor("v", N, P, G, E, dtype=held),
        tensor("tables", B, M, dtype=DType.I32),
        tensor("lens", B, dtype=DType.I32),
        None if starts is None else tensor("starts", starts, dtype=DType.I32),
        tensor("sinks", H) if shape.sinks else None,
        tensor("alibi", H, dtype=DType.F32) if shape.alibi else None,
        *(scales if scaled else ()),
        tensor("q_sinks", rows, H, D) if shape.first else None,
        **{"scale": shape.head_dim**-0.5, "num_sinks": shape.first or None, **attrs},
    )


def layouts_of(node: Node) -> tuple[Layout | None, ...]:
    return tuple(None if arg is None else located(arg)[1] for arg in node.args)


def ragged_operands(
    shape: Shape, sequences: Sequence[tuple[int, int]], padding: int = 0, spare: int = 1
) -> tuple[Operands, dict[str, int]]:
    """Buffers for sequences of (tokens before, tokens now), and the value of each symbol.

    All that lies beyond lengths is poisoned: NaN in caches, page ids outside the cache in tables.
    """
    queries, lengths = [now for _, now in sequences], [sum(pair) for pair in sequences]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return _operands(shape, sum(queries) + padding, lengths, starts, spare)


def decode_operands(
    shape: Shape, lengths: Sequence[int], spare: int = 1
) -> tuple[Operands, dict[str, int]]:
    """As ``ragged_operands``, for sequences of these lengths, each with one token now."""
    return _operands(shape, len(lengths), lengths, None, spare)


def _operands(
    shape: Shape, rows: int, lengths: Sequence[int], starts: torch.Tensor | None, spare: int
) -> tuple[Operands, dict[str, int]]:
    H, G, P = shape.heads, shape.kv_heads, shape.page
    counts = [-(-length // P) for length in lengths]
    M, N = max(counts) + spare, sum(counts) + 2
    ids = torch.randperm(N)[: sum(counts)].split(counts)
    tables = torch.where(torch.rand(len(lengths), M) < 0.5, OUTSIDE, -OUTSIDE).int()
    caches = [
        torch.full((N, P, G, width), torch.nan) for width in (shape.head_dim, shape.value_dim)
    ]
    for b, (pages, length) in enumerate(zip(ids, lengths, strict=True)):
        tables[b, : len(pages)] = pages
        for cache in caches:
            filled = torch.full((len(pages) * P, *cache.shape[2:]), torch.nan)
            filled[:length] = torch.randn(length, *cache.shape[2:])
            cache[pages] = filled.unflatten(0, (-1, P))
    wide = (rows, shape.head_dim, H + 3) if shape.strided else (rows, H, shape.head_dim)
    dtype = shape.dtype.torch
    operands = [
        torch.randn(wide).to(dtype),
        *(cache.to(dtype) for cache in caches),
        tables,
        torch.tensor(lengths, dtype=torch.int32),
        starts,
        torch.randn(H).to(dtype) if shape.sinks else None,
        torch.rand(H) if shape.alibi else None,
    ]
    if shape.codes is not None:
        pairs = [_coded(cache, shape.codes) for cache in caches]
        operands[1:3] = [codes for codes, _ in pairs]
        operands += [scales for _, scales in pairs]
    operands.append(torch.randn(rows, H, shape.head_dim).to(dtype) if shape.first else None)
    sizes = {"T": rows, "B": len(lengths), "M": M, "N": N, "P": P}
    if starts is None:
        del sizes["T"]
    return operands, sizes


def _coded(cache: torch.Tensor, codes: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows; where nothing is, scales are NaN, and codes that can be."""
    scales = cache.abs().amax(-1, keepdim=True) / (127 if codes is DType.I8 else 448)
    steps = cache / scales
    if codes is DType.I8:
        steps = steps.round().nan_to_num(127.0)
    return steps.to(codes.torch), scales


def truth(shape: Shape, node: Node, operands: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The reference in double precision."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in operands]
    if shape.codes is not None:
        wide[1:3] = [wide[i].double() * wide[i + 7] for i in (1, 2)]
        del wide[8:10]
    if shape.strided:
        wide[0] = wide[0][:, :, 2 : shape.heads + 2].transpose(1, 2)
    return OP.reference(*wide, **dict(node.attrs))


FEATURES = st.fixed_dictionaries(
    {},
    optional={
        "window": st.sampled_from([1, 3, 20]),
        "softcap": st.sampled_from([0.5, 30.0]),
        "causal": st.just(False),
    },
)
SHAPES = st.builds(
    Shape,
    group=st.sampled_from([1, 3, 4, 8, 19]),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 17, 64, 80, 96]),
    value_dim=st.sampled_from([8, 16, 64, 80]),
    page=st.sampled_from([1, 7, 8, 16, 48, 64, 256]),
    paged=st.booleans(),
    sinks=st.booleans(),
    alibi=st.booleans(),
    strided=st.booleans(),
)
RAGGED = st.lists(
    st.tuples(st.sampled_from([0, 1, 30, 70]), st.sampled_from([0, 0, 1, 1, 2, 5, 21])),
    min_size=1,
    max_size=4,
)
LENGTHS = st.lists(
    st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 64, 65, 135]), min_size=1, max_size=4
)
