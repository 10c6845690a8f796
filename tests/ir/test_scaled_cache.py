"""The ops of a cache of codes against the plain ones over the numbers that the codes stand for, and
codes against their definition.
"""

from __future__ import annotations

import pytest
import torch

from tilewright.errors import GraphError
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick

ATTEND, PLAIN = schema("scaled_paged_attention"), schema("paged_attention")
APPEND, PLAIN_APPEND = schema("scaled_append_kv"), schema("append_kv")
CODES = {DType.I8: (torch.int8, 127.0), DType.F8E4M3: (torch.float8_e4m3fn, 448.0)}
T, B, M, N, P = map(symbol, "TBMNP")


def rounded(x: torch.Tensor, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows by the definition: the largest of a row gets the largest code."""
    kind, largest = CODES[dtype]
    scale = x.abs().amax(-1, keepdim=True).float() / largest
    scale[scale == 0] = 1.0
    steps = x.float() / scale
    return (steps.round() if kind == torch.int8 else steps).to(kind), scale


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("ragged", [True, False])
def test_attention_is_that_over_what_codes_stand_for(dtype: DType, ragged: bool) -> None:
    q = torch.randn(4 if ragged else 2, 4, 8).double()
    (k, k_scale), (v, v_scale) = (rounded(torch.randn(5, 4, 2, d), dtype) for d in (8, 6))
    tables = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    lens, starts = torch.tensor([7, 2]), torch.tensor([0, 3, 4]) if ragged else None
    metadata = (tables, lens, starts, torch.randn(4).double(), None)
    attrs = {"scale": 0.3, "window": 5, "softcap": 4.0}
    found = ATTEND.reference(q, k, v, *metadata, k_scale, v_scale, **attrs)
    numbers = (k.double() * k_scale.double(), v.double() * v_scale.double())
    assert torch.equal(found, PLAIN.reference(q, *numbers, *metadata, **attrs))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_after_they_are_turned(dtype: DType, element: torch.dtype) -> None:
    kind, _ = CODES[dtype]
    k, v, q = (torch.randn(3, heads, d).to(element) for heads, d in ((2, 8), (2, 6), (4, 8)))
    v[1, 1] = 0.0
    caches = [torch.zeros(3, 4, 2, d).to(kind) for d in (8, 6)]
    scales = [torch.zeros(3, 4, 2, 1) for _ in range(2)]
    slots = torch.tensor([9, 2, 4])
    turn = (q, torch.randn(3, 4).to(element), torch.randn(3, 4).to(element))
    found = APPEND.reference(k, v, *caches, *scales, slots, *turn)
    plain = [torch.zeros(3, 4, 2, d).to(element) for d in (8, 6)]
    wanted = PLAIN_APPEND.reference(k, v, *plain, slots, *turn)
    for index in range(2):
        rows = wanted[index].flatten(0, 1)[slots]
        codes, scale = rounded(rows, dtype)
        assert torch.equal(found[index].flatten(0, 1)[slots].float(), codes.float())
        assert torch.equal(found[2 + index].flatten(0, 1)[slots], scale)
        written = torch.zeros(12, dtype=torch.bool)
        written[slots] = True
        assert not found[index].flatten(0, 1)[~written].float().any()
    assert torch.equal(found[4], wanted[2])
    assert found[3].flatten(0, 1)[2, 1] == 1.0, "a row of zeros"


def tensor(name: str, dtype: DType, *shape: object) -> Node:
    return input_node(name, TensorType(dtype, shape))  # type: ignore[arg-type]


def attention(k: DType = DType.I8, v: DType = DType.I8, scales: object = None) -> Node:
    shape = (N, P, 2, 1) if scales is None else scales
    return make(
        "scaled_paged_attention",
        tensor("q", DType.BF16, B, 4, 128),
        tensor("k", k, N, P, 2, 128),
        tensor("v", v, N, P, 2, 64),
        tensor("tables", DType.I32, B, M),
        tensor("lens", DType.I32, B),
        *(None, None, None),
        tensor("ks", DType.F32, *shape),  # type: ignore[misc]
        tensor("vs", DType.F32, N, P, 2, 1),
        scale=0.1,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": DType.BF16}, "codes"),
        ({"k": DType.F8E4M3}, "both i8 or both f8e4m3"),
        ({"scales": (N, P, 2)}, "a scale for each row"),
        ({"scales": (N, P, 1, 1)}, "a scale for each row"),
    ],
)
def test_what_is_ill_typed(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        attention(**wrong)  # type: ignore[arg-type]


def test_an_append_needs_scales_for_the_codes() -> None:
    new = [tensor(name, DType.F32, T, 2, 8) for name in "kv"]
    caches = [tensor(f"{name}c", DType.I8, N, P, 2, 8) for name in "kv"]
    scales = [tensor(f"{name}s", DType.F32, N, P, 2, 8) for name in "kv"]
    with pytest.raises(GraphError, match="a scale for each row"):
        make("scaled_append_kv", *new, *caches, *scales, tensor("slots", DType.I64, T))


def test_bytes_are_those_of_codes_and_scales() -> None:
    sizes = {"B": 3, "M": 9, "N": 10, "P": 16}
    node = attention()
    rows = 10 * 16 * 2
    moved = 3 * 4 * (128 + 64) * 2 + rows * (128 + 64) + 2 * rows * 4 + 3 * 9 * 4 + 3 * 4
    assert evaluate(ATTEND.cost(node).bytes, sizes) == moved
    new = [tensor(name, DType.BF16, T, 2, 8) for name in "kv"]
    caches = [tensor(f"{name}c", DType.F8E4M3, N, P, 2, 8) for name in "kv"]
    scales = [tensor(f"{name}s", DType.F32, N, P, 2, 1) for name in "kv"]
    call = make("scaled_append_kv", *new, *caches, *scales, tensor("slots", DType.I64, T))
    a_token = 2 * 2 * (8 * 2 + 8 + 4) + 8
    assert evaluate(APPEND.cost(call).bytes, {"T": 5, **sizes}) == 5 * a_token
