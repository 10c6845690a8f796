"""Elementwise rules against torch, with its type promotion."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from lowering_oracle import assert_same, lowered, ops

UNARY = [
    *("neg", "abs", "exp", "sin", "cos", "tanh", "sigmoid", "erf", "relu", "floor", "ceil"),
    *("round", "sign", "trunc", "expm1", "exp2", "square", "isnan", "isinf", "isfinite", "sgn"),
    *("logical_not", "tan", "sinh", "cosh", "frac"),
]
POSITIVE = ["log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal"]
ACTIVATIONS = [
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    F.relu6,
    F.hardtanh,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.celu,
    F.softplus,
    lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    F.mish,
    F.logsigmoid,
    F.hardsigmoid,
    F.hardswish,
    F.glu,
    F.softsign,
    F.tanhshrink,
    lambda x: F.threshold(x, 0.1, -3.0),
    lambda x: F.prelu(x, torch.tensor([0.3])),
]
BINARY = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.maximum,
    torch.minimum,
    torch.remainder,
    torch.floor_divide,
    torch.fmod,
    torch.eq,
    torch.lt,
    torch.ge,
    torch.logical_and,
    torch.logical_xor,
    lambda a, b: torch.add(a, b, alpha=3),
    lambda a, b: torch.div(a, b, rounding_mode="floor"),
    lambda a, b: torch.rsub(a, b),
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: torch.addcmul(a, a, b, value=0.5),
    lambda a, b: torch.addcdiv(a, a, b + 9, value=2.0),
    lambda a, b: torch.clamp(a, min=b),
]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool]


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(-4, 5, shape, dtype=dtype)


def each(functions: list[Callable[..., object]]) -> Callable[..., object]:
    """All of them in one module: exporting takes longer than all else."""
    return lambda *inputs: tuple(function(*inputs) for function in functions)


def named(names: list[str]) -> Callable[..., object]:
    return each([getattr(torch, name) for name in names])


@pytest.mark.quick
def test_unary() -> None:
    assert_same(named(UNARY), torch.randn(3, 5) * 3, tolerance=2e-6)


def test_unary_of_positive_numbers() -> None:
    assert_same(named(POSITIVE), torch.rand(3, 5) + 0.01)


def test_unary_promotes_integers_as_torch_does() -> None:
    names = ["sqrt", "exp", "sigmoid", "neg", "abs", "isfinite"]
    assert_same(named(names), torch.arange(5), tolerance=2e-6)


def test_activations() -> None:
    assert_same(each(ACTIVATIONS), torch.randn(3, 8) * 4)


def test_binary_broadcasts() -> None:
    assert_same(each(BINARY), torch.randn(3, 1, 5), torch.randn(4, 1) + 0.3)


def test_nan_and_infinity_pass_as_in_torch() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 2.5, -2.5])
    names = ["isnan", "isinf", "isfinite", "relu", "round", "trunc", "expm1", "sign"]
    assert_same(named(names), odd)
    assert_same(lambda x: (x.clamp(-1, 1), x.masked_fill(x.isnan(), -math.inf)), odd)


@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_mixed_types_promote(left: torch.dtype) -> None:
    def mixed(a: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for b in others:
            found += [a + b, a * b, a == b, a >= b, torch.maximum(a, b), torch.where(b > 0, a, b)]
        return found

    assert_same(mixed, drawn(left, 3, 4), *(drawn(right, 4) for right in TYPES))


def test_python_numbers_promote_as_numbers() -> None:
    def numbers(*inputs: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for x in inputs:
            found += [x * 2, x + 0.5, x == 1, x > 0.5, 3 - x.float(), x / 2, x.clamp(-1, 2)]
            found += [torch.clamp(x, max=1), torch.fmod(x.float(), 3)]
        return found

    assert_same(numbers, *(drawn(dtype, 3, 4) for dtype in TYPES[:-1]))


def test_integer_division() -> None:
    signed = torch.tensor([-7, -3, -1, 0, 1, 3, 7])
    assert_same(
        lambda a, b: (a // b, a % b, torch.fmod(a, b), a / b, torch.fmod(a, -2), a**2),
        *(signed, torch.tensor(2)),
    )


def test_scalar_tensors_do_not_widen() -> None:
    assert_same(lambda x, s: (x * s, x > s), torch.randn(3), torch.tensor(1.5, dtype=torch.float64))


def test_pow() -> None:
    exponents = [-2.0, -1.0, 0.5, 2.0, 3.0, 2, 3]
    assert_same(lambda x: [x**e for e in exponents] + [2**x], torch.rand(5) + 0.5)


def test_one_element_type_an_op() -> None:
    graph = lowered(lambda a, b: a + b, (torch.randn(2), torch.arange(2)))
    assert ops(graph) == ["cast", "add"]


def test_sizes_as_numbers() -> None:
    x, y = torch.randn(2, 5), torch.randn(2, 9)
    assert_same(
        lambda x: (x * x.shape[1], x / x.shape[1] ** 0.5, x.shape[1], x > x.shape[1] / 2),
        x,
        dynamic=({1: torch.export.Dim("S", max=99)},),
        others=[(y,)],
    )


def test_integer_bit_operations_stay_with_torch() -> None:
    assert_same(
        lambda a, b: a & b, torch.arange(4), torch.arange(4), foreign=["aten.bitwise_and.Tensor"]
    )
