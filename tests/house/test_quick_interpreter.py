"""What is made once for a shape is what Triton makes for each tensor."""

from __future__ import annotations

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

import quick_interpreter


def test_a_shape_is_as_a_type_and_as_a_tensor_has_it() -> None:
    type_ = tl.block_type(tl.float32, [tl.constexpr(4), 8])
    assert (list(type_.shape), type_.numel) == ([4, 8], 32)
    assert str(type_) == "<['4', '8'], fp32>"
    assert type_ == tl.block_type(tl.float32, (4, 8)) != tl.block_type(tl.float32, (8, 4))
    tensor = tl.tensor(None, type_)
    assert [size.value for size in tensor.shape] == [4, 8]
    assert (tensor.numel.value, tensor.dtype) == (32, tl.float32)
    scalar = tl.tensor(None, tl.int32)
    assert (list(scalar.shape), scalar.numel.value, scalar.dtype) == ([], 1, tl.int32)


@pytest.mark.parametrize(
    ("shape", "error"), [((), TypeError), ((3,), ValueError), ((2.5,), TypeError)]
)
def test_what_is_no_shape_is_refused(shape, error) -> None:
    with pytest.raises(error):
        tl.block_type(tl.float32, shape)


def test_numbers_have_their_types_and_addresses_64_bits() -> None:
    found = [interpreter._get_np_dtype(one) for one in (tl.int1, tl.float16, tl.bfloat16)]
    assert found == [np.dtype(bool), np.dtype(np.float16), np.dtype(np.uint16)]
    address = tl.pointer_type(tl.float32)
    for one in (address, tl.block_type(address, (4,))):
        assert interpreter._get_np_dtype(one) == np.dtype(np.uint64)


@triton.jit
def _doubled(
    x,
    factor: tl.constexpr = 2,
):
    y = x * factor
    y = y + 1
    return y + x


def test_a_function_is_rewritten_at_the_lines_of_its_file() -> None:
    rewriter = _doubled.rewriter
    quick, slow = rewriter.rewrite_ast(), quick_interpreter._REWRITE(rewriter)
    assert quick.__code__.co_code == slow.__code__.co_code
    assert list(quick.__code__.co_lines()) == list(slow.__code__.co_lines())
    assert quick.__globals__ is slow.__globals__
    assert quick.__defaults__ == (2,)


def test_a_function_without_a_file_is_left_as_it_is() -> None:
    here: dict[str, object] = {}
    exec("def f(x): return x", here)
    assert interpreter.FunctionRewriter(here["f"]).rewrite_ast() is here["f"]
