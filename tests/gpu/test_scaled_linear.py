"""Decode products of two operands in codes on a GPU, against float64 over what the codes stand for;
and those of the library.
"""

from __future__ import annotations

import pytest
import torch

from gpu_kernels import examples, here, on_device, poisoned_kernels
from linear_forms import Form, assert_close
from quant_forms import ScaledForm, scaled_forms, scaled_node, scaled_operands
from tilewright.codegen.triton.kernels.scaled_linear import emit_scaled_linear
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.scaled_library import scaled_product
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType
from tilewright.ir.schema import schema

pytestmark = pytest.mark.gpu
TOKENS = (1, 2, 16, 17, 40, 100, 130)
GATED = Form(4096, 1536, DType.BF16, "weight", halves=True)
DOWN = Form(14336, 256, DType.BF16, behind=("residual",))
FORMS = [
    ScaledForm(form, codes, group, rows, static)
    for form in (GATED, DOWN)
    for codes in (DType.F8E4M3, DType.I8)
    for group, rows, static in ((0, 1, False), (0, 0, True), (128, 128, False))
]


def source_of(form: ScaledForm) -> KernelSource:
    node = scaled_node(form)
    source = emit_scaled_linear(node, tuple(located(o)[1] for o in node.operands), here())
    assert source is not None
    return source


def check(forms: list[ScaledForm]) -> None:
    kernels = poisoned_kernels([(source_of(form), scaled_node(form)) for form in forms])
    for form, kernel in zip(forms, kernels, strict=True):
        for tokens in TOKENS:
            bases, wanted = scaled_operands(form, tokens)
            (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
            # Tensor cores keep some 14 bits of a sum of e4m3.
            least = 1e-3 if form.codes is DType.F8E4M3 and tokens > 1 else 0.0
            assert_close(form.form, found.cpu(), wanted, about=form, least=least)


def test_a_layers_products() -> None:
    check(FORMS)


def test_any_form() -> None:
    check(examples(scaled_forms(large=True), 24))


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize("codes", [DType.F8E4M3, DType.I8])
def test_the_librarys_product(codes: DType, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 1024, generator=generator)
    weight = torch.randn(512, 1024, generator=generator) / 32
    rounded = schema("quantize_rows").reference
    xq, xs = rounded(x, dtype=codes)
    wq, ws = rounded(weight, dtype=codes)
    bias = torch.randn(512, generator=generator).bfloat16()
    operands = [xq, xs, wq, ws, bias]
    found = scaled_product(*(o.cuda() for o in operands), dtype=DType.BF16)
    doubles = (xq, xs.double(), wq, ws.double(), bias.double())
    wanted = schema("scaled_linear").reference(*doubles, dtype=DType.F64)
    assert found.dtype is torch.bfloat16
    deviation = float((found.cpu().double() - wanted).abs().max())
    assert deviation <= 1e-2 * float(wanted.abs().max())
