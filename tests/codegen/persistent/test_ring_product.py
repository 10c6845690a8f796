"""Products of a ring by tensor cores: where the PTX ISA puts what, and what codes become."""

from __future__ import annotations

import torch


def test_the_diagonals_are_the_products_of_two_rows_with_a_group_of_lanes_x() -> None:
    """Fragments of PTX ISA 9.7.14.5 (m16n8k16)."""
    random = torch.Generator().manual_seed(1)
    one, other, x = (torch.randn(32, 2, 2, generator=random, dtype=torch.float64) for _ in range(3))
    a, b = torch.zeros(16, 16).double(), torch.zeros(16, 8).double()
    for lane in range(32):
        group, place = divmod(lane, 4)
        for word in range(2):
            k = 2 * place + 8 * word
            a[group, k : k + 2] = one[lane, word]  # a0 and a2
            a[group + 8, k : k + 2] = other[lane, word]  # a1 and a3
            b[k : k + 2, group] = x[lane, word]
    c = a @ b
    for group in range(8):
        lane, odd = 4 * group + group // 2, group % 2
        assert lane % 4 == lane % 32 // 8  # as the kernel finds it
        lanes = slice(4 * group, 4 * group + 4)
        # c0 and c1 of a lane are columns 2 t and 2 t + 1 of row g, c2 and c3 those of row g + 8.
        row, column = lane // 4, 2 * (lane % 4) + odd
        torch.testing.assert_close(c[row, column], (x[lanes] * one[lanes]).sum())
        torch.testing.assert_close(c[row + 8, column], (x[lanes] * other[lanes]).sum())


def test_a_mask_makes_two_numbers_of_two_codes() -> None:
    codes = [3, 15, 0, 7, 8, 1, 12, 9]
    word = sum(code << (4 * i) for i, code in enumerate(codes))
    for i in range(4):
        pair = (word >> (4 * i)) & 0x000F000F | 0x43004300
        halves = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.int16)
        assert halves.view(torch.bfloat16).tolist() == [128.0 + codes[i], 128.0 + codes[i + 4]]
    eights = torch.tensor([-0x77777778], dtype=torch.int32).view(torch.uint8)
    assert eights.tolist() == [0x88] * 4


def test_float16_has_all_codes_of_8_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float()
    known = numbers.isfinite()
    assert torch.equal(numbers.half().float()[known], numbers[known])
