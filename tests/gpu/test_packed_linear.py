"""Decode products of 4-bit weights and rows rounded to int8 on a GPU, against float64 over what the
codes stand for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_kernels import examples, here, on_device, poisoned_kernels
from linear_forms import Form, assert_close
from quant_forms import QuantForm, packed_forms, packed_operands, quant_node, quant_operands
from tilewright.codegen.triton.kernels.packed_linear import emit_packed_linear
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType

pytestmark = pytest.mark.gpu
TOKENS = (1, 2, 16, 17, 40, 100, 130)
GATED = Form(4096, 1536, DType.BF16, "weight", halves=True)
DOWN = Form(14336, 256, DType.BF16, behind=("residual",))
FORMS = [
    QuantForm(form, DType.U8, group, scale=scale, zero=zero, compute=DType.I8)
    for form in (GATED, DOWN)
    for group, scale in ((32, DType.BF16), (64, DType.BF16), (128, DType.BF16), (0, DType.F32))
    for zero in (None, DType.U8)
]


def source_of(form: QuantForm) -> KernelSource:
    node = quant_node(form)
    source = emit_packed_linear(node, tuple(located(o)[1] for o in node.operands), here())
    assert source is not None
    return source


def check(forms: list[QuantForm]) -> None:
    kernels = poisoned_kernels([(source_of(form), quant_node(form)) for form in forms])
    for form, kernel in zip(forms, kernels, strict=True):
        for tokens in TOKENS:
            if tokens == 1 or form.group != 32:
                bases, wanted = packed_operands(form, min(form.group or 128, 128), tokens)
            else:  # several tokens of small groups are not rounded
                bases, wanted = quant_operands(form, tokens)
            (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
            assert_close(form.form, found.cpu(), wanted)


def test_a_layers_products() -> None:
    check(FORMS)


def test_any_form() -> None:
    check(examples(packed_forms(large=True), 24))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(value: float) -> None:
    form = replace(FORMS[4], form=replace(DOWN, behind=()))
    (kernel,) = poisoned_kernels([(source_of(form), quant_node(form))])
    for tokens in (1, 3):
        bases, _ = packed_operands(form, 128, tokens)
        bases[0][0, 5] = value
        (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
        assert found[0].isnan().all() and not found[1:].isnan().any()
