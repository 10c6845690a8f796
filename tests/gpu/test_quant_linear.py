"""Decode products over quantized weights on a GPU, against float64 of the dequantized weight."""

from __future__ import annotations

import pytest

from gpu_kernels import examples, here, on_device, poisoned_kernels
from linear_forms import Form, assert_close
from quant_forms import QuantForm, quant_forms, quant_node, quant_operands
from tilewright.codegen.triton.kernels.quant_linear import emit_quant_linear
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType

pytestmark = pytest.mark.gpu
TOKENS = (1, 2, 16, 17, 40, 100, 130)
GATED = Form(4096, 1536, DType.BF16, "weight", halves=True)
DOWN = Form(14336, 256, DType.BF16, behind=("residual",))
FORMS = [
    QuantForm(form, codes, group, rows, scale)
    for form in (GATED, DOWN)
    for codes, group, rows, scale in (
        (DType.U8, 128, 1, DType.BF16),
        (DType.I8, 0, 1, DType.F32),
        (DType.F8E4M3, 0, 1, DType.F32),
        (DType.F8E4M3, 128, 128, DType.F32),
    )
]


def source_of(form: QuantForm) -> KernelSource:
    node = quant_node(form)
    source = emit_quant_linear(node, tuple(located(o)[1] for o in node.operands), here())
    assert source is not None
    return source


def check(forms: list[QuantForm]) -> None:
    kernels = poisoned_kernels([(source_of(form), quant_node(form)) for form in forms])
    for form, kernel in zip(forms, kernels, strict=True):
        for tokens in TOKENS:
            bases, wanted = quant_operands(form, tokens)
            (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
            assert_close(form.form, found.cpu(), wanted, about=form)


def test_a_layers_products_by_scheme() -> None:
    check(FORMS)


def test_any_form() -> None:
    check(examples(quant_forms(large=True), 24))
