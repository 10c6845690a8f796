"""Weights in codes as numbers on a GPU: equal to the op's reference to the bit."""

from __future__ import annotations

import pytest
import torch

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.dequantize import emit_dequantize
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import located
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import Target

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codes", [DType.U8, DType.I8, DType.F8E4M3])
@pytest.mark.parametrize("n, k, group", [(4096, 14336, 128), (77, 1000, 32), (300, 576, 0)])
@pytest.mark.parametrize("zero", [None, DType.F32, DType.U8])
def test_dequantize(codes: DType, n: int, k: int, group: int, zero: DType | None) -> None:
    packed = codes is DType.U8
    shape = (n, blocks(k, group))
    stored = (n, packed_width(k, group) if packed else k)
    inputs = [("q", codes, stored), ("s", DType.BF16, shape), ("z", zero, shape)]
    nodes = [None if t is None else input_node(name, TensorType(t, s)) for name, t, s in inputs]
    width = k if packed else None
    node = make("dequantize", *nodes, dtype=DType.BF16, rows=1, group=group, width=width)
    target, generator = Target.detect(), torch.Generator("cuda").manual_seed(n)
    layouts = [None if arg is None else located(arg)[1] for arg in node.args]
    source = emit_dequantize(node, layouts, target)
    assert source is not None
    (package,) = compile_sources([source], target.arch)
    operands: list[torch.Tensor | None] = [None, None, None]
    for index, (_, dtype, size) in enumerate(inputs):
        if dtype is not None:
            value = torch.randn(size, generator=generator, device="cuda") * 40
            value = value.clamp(0, 255) if dtype is DType.U8 else value
            operands[index] = value.to(dtype.torch)
    kernel = LaunchedKernel(package, node.types, (), torch.device("cuda"))
    (found,) = kernel(operands, {})
    assert torch.equal(found, schema("dequantize").reference(*operands, **dict(node.attrs)))
