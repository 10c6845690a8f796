"""Linears of many tokens on a GPU that has tensor descriptors, against float64."""

from __future__ import annotations

import pytest

from gpu_kernels import here, on_device, poisoned_kernels
from linear_forms import Form, assert_close, body_of, in_float64, node_of, operands_of
from tilewright.codegen.triton.kernels.tma_linear import emit_tma_linear
from tilewright.codegen.triton.kernels.tma_linear_tiles import TMA
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType

pytestmark = pytest.mark.gpu
TOKENS = (1, 65, 128, 300, 1024)
FORMS = [
    Form(1024, 1536, DType.BF16, "weight", halves=True),
    Form(3584, 1024, DType.BF16, behind=("residual",)),
    Form(1000, 520, DType.F16, "bare", bias=True, behind=("gelu", "columns")),
    Form(1016, 40, DType.BF16, bias=True, halves=True, strided=True),
]


def source_of(form: Form) -> KernelSource:
    node = node_of(form)
    source = emit_tma_linear(node, tuple(located(o)[1] for o in node.operands), here())
    assert source is not None
    return source


def test_every_prologue_and_epilogue() -> None:
    if here().arch < TMA:
        pytest.skip("a device without tensor descriptors")
    kernels = poisoned_kernels([(source_of(form), node_of(form)) for form in FORMS])
    for form, kernel in zip(FORMS, kernels, strict=True):
        for tokens in TOKENS:
            bases, operands = operands_of(form, tokens)
            (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
            assert_close(form, found.cpu(), in_float64(body_of(form), operands))
