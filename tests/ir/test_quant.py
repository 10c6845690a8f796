"""Quantized weights and rows: layouts by hand, saturation, and what is ill-typed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import GraphError
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.ops.quant import packed_width
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick

DEQUANTIZE = schema("dequantize").reference
ROWS = schema("quantize_rows").reference
PRODUCT = schema("scaled_linear").reference
F32 = DType.F32


def test_four_bits_by_hand():
    packed = torch.tensor([[0x21, 0x43], [0xF0, 0x8C]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0], [1.0, -1.0]])
    found = DEQUANTIZE(packed, scale, dtype=F32, group=2, width=3)
    assert found.tolist() == [[(1 - 8) * 0.5, (2 - 8) * 0.5, (3 - 8) * 2.0], [-8.0, 7.0, -4.0]]
    zero = torch.tensor([[1, 0], [15, 12]], dtype=torch.uint8)
    found = DEQUANTIZE(packed, scale, zero, dtype=F32, group=2, width=3)
    assert found.tolist() == [[0.0, 0.5, 6.0], [-15.0, 0.0, 0.0]]


def test_blocks_by_hand():
    codes = torch.arange(-6, 6, dtype=torch.int8).view(3, 4)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = DEQUANTIZE(codes, scale, dtype=F32, rows=2, group=3)
    assert found.tolist() == [[-6, -5, -4, -6], [-2, -1, 0, 2], [6, 9, 12, 20]]


@given(st.integers(1, 40), st.sampled_from([0, 2, 6, 32]))
def test_packed_rows_hold_whole_groups(width: int, group: int):
    stored = -(-width // group) * group if group else width
    assert packed_width(width, group) == (stored + 1) // 2


def test_rows_saturate_and_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -127.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = ROWS(x, dtype=DType.I8)
    assert codes.tolist() == [[127, 0, 2, -127], [0, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [1.0]]
    codes, _ = ROWS(x, torch.tensor([0.25]), dtype=DType.F8E4M3)
    assert codes.float().tolist()[0] == [448.0, 2.0, 6.0, -448.0]


@given(st.integers(1, 130), st.integers(1, 9), st.integers(0, 9999))
def test_no_other_try_has_a_smaller_error(width: int, tries: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, width, generator=generator) * torch.randn(width, generator=generator).exp()
    codes, scale = ROWS(x, dtype=DType.F8E4M3, tries=tries)
    error = (codes.double() * scale.double() - x).square().sum(-1)
    least = x.abs().amax(-1, keepdim=True) / 448
    for j in range(tries):
        other = least * 2.0 ** (j / tries)
        rounded = (x / other).clamp(-448, 448).to(codes.dtype).double() * other
        worst = (rounded - x).square().sum(-1)
        # Factors have 16 bits behind the point: a code or two may be neighbours.
        assert (error <= worst * 1.001 + (least[:, 0] * 1e-2).square()).all()


def test_the_best_of_the_tries_by_hand():
    """17 times 2**0.5 is nearly the code 24; 18 times 2**0.5 is none, but 18 is one."""
    x = torch.tensor([[448.0, *[17.0 * 2**0.5] * 200]])
    codes, scale = ROWS(x, dtype=DType.F8E4M3, tries=2)
    assert scale.item() == pytest.approx(1.0)
    x = torch.tensor([[448.0, *[18.0 * 2**0.5] * 200]])
    codes, scale = ROWS(x, dtype=DType.F8E4M3, tries=2)
    assert scale.item() == pytest.approx(2**0.5, rel=1e-5)
    assert codes.float()[0, 1:].tolist() == [18.0] * 200


def test_of_equal_tries_the_first_is_taken_whatever_the_order_of_a_row():
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 0.0, -3.5
    codes, scale = ROWS(x, dtype=DType.F8E4M3, tries=8)
    assert scale[:2, 0].tolist() == [1.0, 3.5 / 448]
    order = torch.randperm(48)
    others, same = ROWS(x[:, order], dtype=DType.F8E4M3, tries=8)
    assert torch.equal(same, scale)
    assert torch.equal(others.float(), codes.float()[:, order])
    plain, least = ROWS(x, dtype=DType.F8E4M3)
    once, same = ROWS(x, dtype=DType.F8E4M3, tries=1)
    assert torch.equal(same, least) and torch.equal(once.float(), plain.float())


def test_a_row_with_a_nan_gives_nan_and_no_other_does():
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]])
    weight, one = torch.tensor([[1, 1]], dtype=torch.int8), torch.ones(1, 1)
    found = PRODUCT(*ROWS(x, dtype=DType.I8), weight, one, dtype=F32)
    assert found.isnan().tolist() == [[True], [True], [False]]


@pytest.mark.parametrize(("dtype", "group"), [(DType.I8, 0), (DType.F8E4M3, 0), (DType.F8E4M3, 8)])
def test_products_are_those_of_the_dequantized_operands(dtype: DType, group: int):
    x, bias = torch.randn(5, 20, dtype=torch.float64), torch.randn(6)
    wq, ws = ROWS(torch.randn(6, 20), dtype=dtype, group=group)
    xq, xs = ROWS(x.float(), dtype=dtype, group=group)
    found = PRODUCT(xq, xs, wq, ws, bias, dtype=F32, group=group)
    step = group or 20
    wide = [
        q.float().double().numpy() * np.repeat(s.double().numpy(), step, 1)[:, :20]
        for q, s in ((xq, xs), (wq, ws))
    ]
    wanted = torch.from_numpy(wide[0] @ wide[1].T) + bias
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_sums_of_int8_are_exact():
    codes = torch.full((1, 70001), 127, dtype=torch.int8)
    one = torch.ones(1, 1)
    found = PRODUCT(codes, one, codes, one, dtype=DType.F64)
    assert found.item() == 70001 * 127 * 127


def _typed(text: str):
    dtype, sizes = text.split("/")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return input_node(f"x{text}", TensorType(DType(dtype), shape))


@pytest.mark.parametrize(
    ("op", "operands", "attrs"),
    [
        ("dequantize", ["u8/4,8", "f32/4,2"], {"group": 8}),
        ("dequantize", ["u8/4,8", "f32/4,2"], {"group": 8, "width": 17}),
        ("dequantize", ["u8/4,8", "f32/4,2"], {"group": 7, "width": 14}),
        ("dequantize", ["i8/4,8", "f32/4,1"], {"width": 8}),
        ("dequantize", ["i8/4,8", "f32/4,2"], {}),
        ("dequantize", ["i8/4,8", "f32/4,1", "u8/4,2"], {}),
        ("dequantize", ["i16/4,8", "f32/4,1"], {}),
        ("dequantize", ["i8/4,8", "f8e4m3/4,1"], {}),
        ("quantize_rows", ["i8/3,8"], {"dtype": DType.I8}),
        ("quantize_rows", ["f32/3,8"], {"dtype": DType.U8}),
        ("quantize_rows", ["f32/3,8", "f32/3"], {"dtype": DType.I8}),
        ("quantize_rows", ["f32/3,8"], {"dtype": DType.I8, "tries": 8}),
        ("quantize_rows", ["f32/3,8"], {"dtype": DType.F8E4M3, "tries": 0}),
        ("quantize_rows", ["f32/3,8"], {"dtype": DType.F8E4M3, "tries": 65}),
        ("quantize_rows", ["f32/3,8"], {"dtype": DType.F8E4M3, "tries": 8, "group": 4}),
        ("quantize_rows", ["f32/3,8", "f32/1"], {"dtype": DType.F8E4M3, "tries": 8}),
        ("quantize_rows", ["f32/3,8", "f32/1"], {"dtype": DType.I8, "group": 4}),
        ("scaled_linear", ["i8/3,8", "f32/3,1", "f8e4m3/4,8", "f32/4,1"], {}),
        ("scaled_linear", ["i8/3,8", "f32/3,1", "i8/4,9", "f32/4,1"], {}),
        ("scaled_linear", ["i8/3,8", "f32/3,2", "i8/4,8", "f32/4,1"], {}),
        ("scaled_linear", ["i8/3,8", "f32/1", "i8/4,8", "f32/4,2"], {"group": 4}),
        ("scaled_linear", ["i8/3,8", "f32/3,1", "i8/4,8", "f32/4,1", "f32/3"], {}),
    ],
)
def test_ill_typed_calls_are_refused(op: str, operands: list[str], attrs: dict[str, object]):
    given = {"dtype": F32, **attrs}
    with pytest.raises(GraphError):
        make(op, *map(_typed, operands), **given)
