"""sample for tests: nodes, rows of logits that are smooth, tied, masked or broken, parameters of
every kind, and whether a token is one that brute force allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from sampling_oracle import acceptable
from tilewright.codegen.triton.kernels.sample import Problem, Tiles, sample_source
from tilewright.codegen.triton.layout import Layout, located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

# Sums in float32 may be off by so much of the whole (the docstring of kernels/sample.py).
EPSILON = 1e-5
INFINITY, NAN = math.inf, math.nan
SMALL = Tiles(chunk=16, block=64, num_warps=4, num_stages=1)
R = symbol("R")
Row = tuple[float, int, float, float, float]  # temperature, top_k, top_p, min_p, uniform
FLOATS = (DType.F32, DType.BF16, DType.F16)
BEFORE, BEHIND = 3, 4  # elements of a wider row that stand beside the logits


def call(vocab: Size, dtype: DType, logits: Node | None = None) -> Node:
    logits = logits or input_node("logits", TensorType(dtype, (R, vocab)))
    names = schema("sample").operands[1:]
    types = (DType.I32 if name == "top_k" else DType.F32 for name in names)
    given = (input_node(n, TensorType(t, (R,))) for n, t in zip(names, types, strict=True))
    return make("sample", logits, *given)


def wide_call(vocab: int, dtype: DType) -> Node:
    """The call over logits that lie within wider rows."""
    base = input_node("wide", TensorType(dtype, (R, BEFORE + vocab + BEHIND)))
    return call(vocab, dtype, make("slice", base, dim=1, start=BEFORE, stop=BEFORE + vocab))


def widened(logits: torch.Tensor) -> torch.Tensor:
    """The buffer of ``wide_call``: NaN beside the logits."""
    count, vocab = logits.shape
    wide = torch.full((count, BEFORE + vocab + BEHIND), NAN, dtype=logits.dtype)
    wide[:, BEFORE : BEFORE + vocab] = logits
    return wide


def layouts_of(node: Node) -> tuple[Layout | None, ...]:
    return tuple(located(arg)[1] for arg in node.operands)


def problem_of(node: Node) -> Problem | None:
    return Problem.of(node, layouts_of(node))


def source_of(node: Node, tiles: Tiles = SMALL, pdl: bool = False) -> KernelSource:
    problem = problem_of(node)
    assert problem is not None
    return sample_source(problem, tiles, pdl)


def parameters(rows: Sequence[Row]) -> list[torch.Tensor]:
    return [
        torch.tensor([row[i] for row in rows], dtype=torch.int32 if i == 1 else torch.float32)
        for i in range(5)
    ]


def assert_acceptable(
    logits: torch.Tensor, rows: Sequence[Row], found: Sequence[int], epsilon: float = EPSILON
) -> None:
    """Each row's token is right: its interval of the distribution function, widened by the error
    of sums, holds ``uniform``.
    """
    held = torch.stack([p.double() for p in parameters(rows)], 1).tolist()
    for row, (token, values) in enumerate(zip(found, held, strict=True)):
        t, k, p, m, u = values
        allowed = acceptable(logits[row], t, int(k), p, m, u, epsilon)
        assert token in allowed, (row, rows[row], token, sorted(allowed)[:9])


UNIFORMS = st.sampled_from([0.0, 1 - 2**-24]) | st.floats(0, 1 - 2**-24, width=32)
SEEDS = st.integers(0, 9999)


def rows_of(vocab: int) -> st.SearchStrategy[Row]:
    """Parameters of a row."""
    return st.tuples(
        st.sampled_from([0.0, 1.0, 1.0, 0.3, 1e-4, 100.0]),
        st.sampled_from([0, 0, 1, 2, 5, 40, vocab, vocab + 9]),
        st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-7, 1 - 2**-24]),
        st.sampled_from([0.0, 0.0, 0.1, 1e-6, 1.0]),
        UNIFORMS,
    )


@st.composite
def logits_of(draw: st.DrawFn, count: int, vocab: int, dtype: DType) -> torch.Tensor:
    """Rows that are smooth, full of ties, masked, or broken."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    logits = torch.randn(count, vocab, generator=generator)
    logits *= draw(st.sampled_from([0.25, 1.0, 6.0]))
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = -INFINITY
    if draw(st.integers(0, 3)) == 0:
        logits[draw(st.integers(0, count - 1)), -1] = draw(st.sampled_from([NAN, INFINITY]))
    return logits.to(dtype.torch)


@st.composite
def calls(draw: st.DrawFn, count: int = 3) -> tuple[torch.Tensor, list[Row]]:
    """Logits of any type over a small vocabulary, and their parameters."""
    vocab = draw(st.integers(1, 90) | st.sampled_from([16, 64]))
    rows = [draw(rows_of(vocab)) for _ in range(count)]
    return draw(logits_of(count, vocab, draw(st.sampled_from(FLOATS)))), rows
