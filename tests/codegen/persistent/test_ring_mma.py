"""Products of a ring by tensor cores: where the PTX ISA puts what, and their machine code."""

from __future__ import annotations

import pytest
import torch

from persistent_codes import Coded
from persistent_forms import RING_MODELS, RING_OF_CODES, WHOLE
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.persistent.ring_source import RingCut
from tilewright.codegen.persistent.source import compile_persistent, source_of
from tilewright.errors import UnsupportedError
from tilewright.ir.dtypes import DType
from tilewright.targets import Target

H100 = Target.parse("h100")
MMA = RingCut(mma=1)
E4M3 = Coded(DType.F8E4M3, rounds=True).graph(RING_OF_CODES.graph())
NIBBLES = Coded(DType.U8, group=128).graph(RING_OF_CODES.graph())


@pytest.mark.parametrize("each", [2, 4], ids=["m16n8k16", "m16n8k32"])
def test_the_diagonal_is_the_dot_product_of_a_group_of_lanes(each: int) -> None:
    """Fragments of PTX ISA 9.7.14.5 (m16n8k16) and .8 (m16n8k32 of 8 bits)."""
    random = torch.Generator().manual_seed(each)
    x, w = (torch.randn(32, 2, each, generator=random, dtype=torch.float64) for _ in range(2))
    a, b = torch.zeros(16, 8 * each).double(), torch.zeros(8 * each, 8).double()
    for lane in range(32):
        group, place = divmod(lane, 4)
        for register in range(2):  # a0 and a2, b0 and b1; a1 and a3 are zero
            k = each * place + 4 * each * register
            a[group, k : k + each] = x[lane, register]
            b[k : k + each, group] = w[lane, register]
    c = a @ b
    for group in range(8):
        lane, result = 4 * group + group // 2, group % 2
        # c0 and c1 of a lane are columns 2 t and 2 t + 1 of row g.
        row, column = lane // 4, 2 * (lane % 4) + result
        lanes = slice(4 * group, 4 * group + 4)
        torch.testing.assert_close(c[row, column], (x[lanes] * w[lanes]).sum())


def test_a_mask_makes_two_numbers_of_two_codes() -> None:
    codes = [3, 15, 0, 7, 8, 1, 12, 9]
    word = sum(code << (4 * i) for i, code in enumerate(codes))
    for i in range(4):
        pair = (word >> (4 * i)) & 0x000F000F | 0x43004300
        halves = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.int16)
        assert halves.view(torch.bfloat16).tolist() == [128.0 + codes[i], 128.0 + codes[i + 4]]
    eights = torch.tensor([-0x77777778], dtype=torch.int32).view(torch.uint8)
    assert eights.tolist() == [0x88] * 4


@pytest.mark.parametrize(
    "graph",
    [RING_MODELS["long rows, heads of 128"].graph(), E4M3, NIBBLES],
    ids=["numbers", "e4m3", "4 bits"],
)
def test_it_compiles_for_hopper(graph) -> None:
    shape = read_decode(graph)
    (binary,) = compile_persistent([source_of(shape, MMA)], H100.arch)
    assert binary.resources.shared <= H100.shared_memory_per_block
    assert binary.resources.spills <= 1024
    assert source_of(shape, RingCut()).text != source_of(shape, MMA).text


@pytest.mark.parametrize(
    "coded", [Coded(DType.F8E4M3), Coded(DType.U8, group=32)], ids=["x is not rounded", "groups"]
)
def test_codes_that_tensor_cores_do_not_multiply_are_refused(coded: Coded) -> None:
    shape = read_decode(coded.graph(RING_OF_CODES.graph()))
    with pytest.raises(UnsupportedError, match="by tensor cores.*groups of 128"):
        source_of(shape, MMA)
    assert source_of(read_decode(WHOLE.graph()), MMA)
