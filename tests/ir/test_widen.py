"""Graphs over a wider type: the same values, without the rounding between."""

from __future__ import annotations

import pytest
import torch

from tilewright.ir.dtypes import DType
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.ir.widen import widened

GRAPH = """
def g(x: bf16[T, 4], codes: f8e4m3[4, 4], scale: f32[4, 1], ids: i64[T]):
    weight: bf16[4, 4] = dequantize(codes, scale, dtype=bf16)
    y: bf16[T, 4] = linear(x, weight)
    z: f32[T, 4] = cast(y, dtype=f32)
    return {"z": z, "ids": ids}
"""


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [DType.F32, DType.F64])
def test_every_narrower_float_but_codes_is_wide(dtype: DType) -> None:
    graph = parse_graph(GRAPH)
    wide = verify(widened(graph, dtype))
    assert [node.dtype for node in wide.inputs] == [
        dtype,
        DType.F8E4M3,
        dtype if dtype is DType.F64 else DType.F32,
        DType.I64,
    ]
    assert wide.output_names == graph.output_names
    x, codes = torch.randn(3, 4).bfloat16(), torch.randn(4, 4).to(torch.float8_e4m3fn)
    scale, ids = torch.rand(4, 1), torch.arange(3)
    given = [x.to(dtype.torch), codes, scale.to(dtype.torch), ids]
    z, kept = interpret(wide, given)
    wanted = x.double() @ (codes.double() * scale.double()).T
    torch.testing.assert_close(z.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, ids)


def test_a_graph_that_is_wide_stays() -> None:
    graph = parse_graph(GRAPH.replace("bf16", "f64").replace("f32", "f64"))
    assert widened(graph, DType.F64) == graph
