"""A gated product of many tokens on a GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_kernels import here, on_device, poisoned_kernels
from linear_forms import Form, assert_close, body_of, in_float64, node_of, operands_of, problem_of
from tilewright.codegen.triton.kernels.wide_linear import takes_wide, wide_source
from tilewright.ir.dtypes import DType

pytestmark = pytest.mark.gpu
FORMS = [
    Form(k, n, dtype, halves=True)
    for k, n in ((4096, 14336), (2048, 8192), (1000, 1048))
    for dtype in (DType.BF16, DType.F16)
]


def test_it_is_the_body_in_float64() -> None:
    if here().arch != 90:
        pytest.skip("the kernel is chosen on Hopper alone")
    forms = [replace(form, behind=("scaled",)) for form in FORMS[-2:]] + FORMS
    sources = []
    for form in forms:
        problem = problem_of(node_of(form))
        assert problem is not None and takes_wide(problem, here())
        sources.append((wide_source(problem, here().sms), node_of(form)))
    for form, kernel in zip(forms, poisoned_kernels(sources), strict=True):
        for tokens in (1, 512, 777):
            bases, operands = operands_of(form, tokens, device="cuda")
            (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
            assert_close(form, found, in_float64(body_of(form), operands))
