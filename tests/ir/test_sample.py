"""The op sample: brute force, the runtime's own sampling, edges, and what is ill-typed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampling_oracle import acceptable
from tilewright.errors import GraphError
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.runtime.filters import draw
from tilewright.runtime.sampling import filtered_logits

SAMPLE = schema("sample")
INFINITY, NAN = math.inf, math.nan


def sampled(logits: list[float], temperature: float, k: int, p: float, m: float, u: float) -> int:
    f32 = [torch.tensor([x]) for x in (temperature, p, m, u)]
    top_k = torch.tensor([k], dtype=torch.int32)
    found = SAMPLE.reference(
        torch.tensor([logits], dtype=torch.float64), f32[0], top_k, f32[1], f32[2], f32[3]
    )
    assert found.dtype is torch.int64 and found.shape == (1,)
    return int(found)


def single(x: float) -> float:
    """As the op's operands hold it."""
    return float(torch.tensor(x, dtype=torch.float32))


LOGITS = st.lists(st.floats(-9, 9) | st.sampled_from([0.0, -0.0, 2.0, -INFINITY]), min_size=1)
UNIFORM = st.floats(0, 1 - 2**-24, width=32)


@given(
    LOGITS,
    st.sampled_from([0.0, 1e-35, 0.5, 1.0, 3.0]),
    st.integers(0, 9),
    st.sampled_from([1.0, 0.0, 1e-6]) | st.floats(0, 1, width=32),
    st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32),
    UNIFORM,
)
def test_it_is_brute_force(
    logits: list[float], temperature: float, k: int, p: float, m: float, u: float
) -> None:
    row = torch.tensor(logits, dtype=torch.float64)
    found = sampled(logits, temperature, k, p, m, u)
    # Sums in another order: 1e-12 of the whole is more than their difference.
    assert found in acceptable(row, single(temperature), k, p, m, u, epsilon=1e-12)


@pytest.mark.quick
def test_it_is_what_the_runtime_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, vocab = 60, 300
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3
    top_k = torch.arange(rows) % 4 * 7
    kinds = torch.rand(3, rows, generator=generator)
    temperature, top_p, min_p = kinds[0] + 0.25, kinds[1].clamp(0.5) * 1.5, kinds[2] * 0.1
    top_p, min_p = top_p.clamp(max=1.0), torch.where(min_p < 0.03, 0.0, min_p)
    uniform = torch.rand(rows, generator=generator)
    params = [
        SimpleNamespace(temperature=float(t), top_k=int(k), top_p=float(p), min_p=float(m))
        for t, k, p, m in zip(temperature, top_k, top_p, min_p, strict=True)
    ]
    wanted = draw(filtered_logits(logits, params), uniform.double()[:, None])
    found = SAMPLE.reference(logits, temperature, top_k.int(), top_p, min_p, uniform)
    assert torch.equal(found, wanted)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("logits", "call", "wanted"),
    [
        ([1.0, 3.0, 3.0], (0.0, 0, 1.0, 0.0, 0.9), 1),
        ([1.0, 3.0, 3.0], (-1.0, 0, 1.0, 0.0, 0.9), 1),
        ([1.0, 3.0, 3.0], (NAN, 0, 1.0, 0.0, 0.9), 1),
        ([-0.0, 0.0, 0.0], (0.0, 0, 1.0, 0.0, 0.9), 0),
        # ties stay together: two of three for k = 1
        ([3.0, 1.0, 3.0], (1.0, 1, 1.0, 0.0, 0.49), 0),
        ([3.0, 1.0, 3.0], (1.0, 1, 1.0, 0.0, 0.51), 2),
        ([3.0, 1.0, 3.0], (1.0, 0, 0.25, 0.0, 0.51), 2),
        ([3.0, 1.0, 3.0], (1.0, 0, 1.0, 1.0, 0.51), 2),
        # more than there are, or none, is no cut
        ([0.0, 0.0], (1.0, 9, 1.0, 0.0, 0.75), 1),
        ([0.0, 0.0], (1.0, -3, 1.0, 0.0, 0.75), 1),
        # the ends of the unit interval, and what lies beyond
        ([-INFINITY, 0.0, 0.0, -INFINITY], (1.0, 0, 1.0, 0.0, 0.0), 1),
        ([-INFINITY, 0.0, 0.0, -INFINITY], (1.0, 0, 1.0, 0.0, 1 - 2**-24), 2),
        ([-INFINITY, 0.0, 0.0, -INFINITY], (1.0, 0, 1.0, 0.0, 1.0), 2),
        ([-INFINITY, 0.0, 0.0, -INFINITY], (1.0, 0, 1.0, 0.0, NAN), 1),
        # top-p is of what top-k leaves: half of two, not of three
        ([2.0, 2.0, 0.0, 2.0], (1.0, 0, 0.5, 0.0, 0.5), 1),
        ([1.0, 0.0, 0.0, -1.0], (1.0, 1, 0.99, 0.0, 0.999), 0),
        # no logit, none that can be compared, none that is finite
        ([1.0, NAN], (0.0, 0, 1.0, 0.0, 0.5), -1),
        ([1.0, NAN], (1.0, 1, 0.5, 0.1, 0.5), -1),
        ([1.0, INFINITY], (1.0, 0, 1.0, 0.0, 0.5), -1),
        ([-INFINITY, -INFINITY], (0.0, 0, 1.0, 0.0, 0.5), -1),
    ],
)
def test_edges(logits: list[float], call: tuple[float, ...], wanted: int) -> None:
    assert sampled(logits, *call) == wanted  # type: ignore[arg-type]


R, V = symbol("R"), symbol("V")
TYPES = [TensorType(DType.F32, (R, V))] + [
    TensorType(DType.I32 if name == "top_k" else DType.F32, (R,)) for name in SAMPLE.operands[1:]
]


def test_the_result_is_a_token_a_row() -> None:
    node = make("sample", *(input_node(f"x{i}", type_) for i, type_ in enumerate(TYPES)))
    assert node.type == TensorType(DType.I64, (R,))
    assert SAMPLE.cost(node).bytes == R * V * 4 + R * 28


@pytest.mark.parametrize(
    ("operand", "type_"),
    [
        (0, TensorType(DType.I64, (R, V))),
        (0, TensorType(DType.F8E4M3, (R, V))),
        (0, TensorType(DType.F32, (1, R, V))),
        (0, TensorType(DType.F32, (R, 0))),
        (1, TensorType(DType.F64, (R,))),
        (2, TensorType(DType.I64, (R,))),
        (3, TensorType(DType.F32, (V,))),
        (4, TensorType(DType.F32, (R, 1))),
        (5, TensorType(DType.BF16, (R,))),
    ],
)
def test_ill_typed_calls_are_refused(operand: int, type_: TensorType) -> None:
    types = [*TYPES[:operand], type_, *TYPES[operand + 1 :]]
    with pytest.raises(GraphError, match="sample"):
        make("sample", *(input_node(f"x{i}", t) for i, t in enumerate(types)))
