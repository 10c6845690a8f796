"""Kernels interpreted in part: right ones give the whole result, wrong ones are named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from experts_forms import OP, Form, node_of, operands_of, routed, source_of
from tilewright.codegen.triton.between import between_launches
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.source import KernelSource, Launch, Pointer, Scalar, Variant
from tilewright.compiler import spot_check
from tilewright.compiler.spot_check import MOST_PROGRAMS, SpotCheckedKernel
from tilewright.errors import VerificationError
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.types import TensorType

T = symbol("T")
BLOCK = 16
SIZE = 3 * MOST_PROGRAMS * BLOCK - 5  # the last program has 11 elements
TEXT = """import triton
import triton.language as tl


@triton.jit
def doubled(x_ptr, out_ptr, T, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < T).to(tl.float32)
    tl.store(out_ptr + index, x + x, mask=index < T)
"""


def kernel(text: str, dtype: DType, aliases: tuple[tuple[int, int], ...] = ()) -> InterpretedKernel:
    arguments = (
        Pointer("x_ptr", dtype, "operand", 0),
        Pointer("out_ptr", dtype, "result", 0),
        Scalar("T", T),
    )
    grid = ((T + (BLOCK - 1)) // BLOCK, 1, 1)
    launch = Launch("doubled", arguments, grid, {"BLOCK": BLOCK})
    source = KernelSource("doubled", "generated", text, (Variant((launch,)),))
    return InterpretedKernel(source, [TensorType(dtype, (T,))], aliases, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _every_operand_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_check, "LARGE", 0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The programs that run."""
    seen: list[tuple[int, int, int]] = []
    programs = SpotCheckedKernel.programs

    def noted(self, launch, grid):
        for program in programs(self, launch, grid):
            seen.append(program)
            yield program

    monkeypatch.setattr(SpotCheckedKernel, "programs", noted)
    return seen


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
def test_some_programs_run_and_the_reference_stands_for_the_others(dtype: DType, ran) -> None:
    x = torch.randn(SIZE).to(dtype.torch)
    (found,) = SpotCheckedKernel(kernel(TEXT, dtype), [x + x])([x], {"T": SIZE})
    assert torch.equal(found, x + x)
    indices = [i for i, _, _ in ran]
    assert len(indices) == MOST_PROGRAMS
    assert indices[0] == 0 and indices[-1] == (SIZE - 1) // BLOCK  # the partial one too


@pytest.mark.quick
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tl.store(out_ptr + index, x + x + (index >= T - 11), mask=index < T)", "output 0"),
        ("tl.store(out_ptr + index, tl.sqrt(-1.0 - x * x), mask=index < T)", "NaN"),
        ("pass", r"0\.333 of its result, written .* found 0\."),
        ("tl.store(out_ptr + index, x + x, mask=(index < T) & (index % 4 == 0))", r"found 0\.083"),
    ],
)
def test_a_wrong_kernel_is_named(wrong: str, message: str) -> None:
    text = re.sub(r"tl\.store.*", wrong, TEXT)
    x = torch.randn(SIZE)
    with pytest.raises(VerificationError, match=rf"(?s)kernel doubled.*{message}"):
        SpotCheckedKernel(kernel(text, DType.F32), [x + x])([x], {"T": SIZE})


def test_all_programs_run_where_a_part_could_not_be_told(ran, monkeypatch) -> None:
    count = -(-SIZE // BLOCK)
    x = torch.randn(SIZE)
    whole = torch.randint(9, (SIZE,))
    SpotCheckedKernel(kernel(TEXT, DType.F32), None)([x], {"T": SIZE})
    SpotCheckedKernel(kernel(TEXT, DType.I64), [whole])([whole], {"T": SIZE})
    SpotCheckedKernel(kernel(TEXT, DType.F32, ((0, 0),)), [x])([x.clone()], {"T": SIZE})
    monkeypatch.setattr(spot_check, "LARGE", SIZE)
    (found,) = SpotCheckedKernel(kernel(TEXT, DType.F32), [x])([x], {"T": SIZE})
    assert torch.equal(found, x + x) and len(ran) == 4 * count


def test_few_programs_and_none_are_run_as_they_are(ran) -> None:
    for size in (0, 1, BLOCK * MOST_PROGRAMS):
        x = torch.randn(size)
        (found,) = SpotCheckedKernel(kernel(TEXT, DType.F32), [x + x])([x], {"T": size})
        assert torch.equal(found, x + x)
    assert len(ran) == 1 + MOST_PROGRAMS


def test_a_kernel_that_ran_before_runs_less(ran) -> None:
    x = torch.randn(SIZE)
    one = SpotCheckedKernel(kernel(TEXT, DType.F32), [x + x], again=True)
    (found,) = one([x], {"T": SIZE})
    assert torch.equal(found, x + x)
    assert len(ran) == spot_check.MOST_AGAIN and ran[-1][0] == (SIZE - 1) // BLOCK


EXPERTS = Form(experts=4, slots=2, inner=200, width=40)


def of_experts(text: str = "") -> SpotCheckedKernel:
    """Of 5 tokens, whose expected result is the reference's; ``text`` in the place of the own."""
    node = node_of(EXPERTS)
    source = source_of(node, None)
    whole = InterpretedKernel.of(replace(source, text=text or source.text), node)
    operands = operands_of(EXPERTS, routed(EXPERTS, 5, "any"))
    expected = OP.reference(*operands, **dict(node.attrs))
    assert isinstance(expected, torch.Tensor)
    return SpotCheckedKernel(whole, [expected], again=True, between=between_launches(node))


def test_launches_between_run_in_part_and_their_workspaces_are_completed(ran) -> None:
    kernel = of_experts()
    operands = operands_of(EXPERTS, routed(EXPERTS, 5, "any"))
    (found,) = kernel(operands, {"T": 5})
    torch.testing.assert_close(found, kernel.expected[0], rtol=1e-4, atol=1e-5)
    # The order of pairs runs whole, two launches of a program; gates and ups, down, and the sum
    # over slots in part.
    assert len(ran) == 2 + 3 * spot_check.MOST_AGAIN


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("_silu(gate, NATIVE) * up", "_silu(gate, NATIVE) + up", "output 0"),
        ("if turn >= 0:", "if turn < -1:", "found 0"),
    ],
)
def test_a_launch_between_that_is_wrong_is_named(right: str, wrong: str, message: str) -> None:
    text = source_of(node_of(EXPERTS), None).text
    assert right in text
    with pytest.raises(VerificationError, match=rf"(?s)kernel experts.*{message}"):
        of_experts(text.replace(right, wrong))(
            operands_of(EXPERTS, routed(EXPERTS, 5, "any")), {"T": 5}
        )
