"""Products of a ring by tensor cores: their PTX, run statement by statement for a warp's lanes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tilewright.codegen.persistent.ring_mma_kernel import TEXTS

LANES = np.arange(32)
GROUPS, PLACES = LANES // 4, LANES % 4


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """float64 [32, 2] of words of two numbers."""
    pairs = words.astype("<u4").view("<u2").reshape(32, 2)
    if kind == "f16":
        return pairs.view(np.float16).astype(np.float64)
    return (pairs.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def mma(kind: str, a: list, b: list, c: list) -> list[np.ndarray]:
    """m16n8k16, with fragments as PTX ISA 9.7.14.5 has them."""
    rows, columns = np.zeros((16, 16)), np.zeros((16, 8))
    for register, words in enumerate(a):
        for i in range(2):
            row, k = GROUPS + 8 * (register % 2), 2 * PLACES + 8 * (register // 2) + i
            rows[row, k] = halves(words, kind)[:, i]
    for register, words in enumerate(b):
        for i in range(2):
            columns[2 * PLACES + 8 * register + i, GROUPS] = halves(words, kind)[:, i]
    found = rows @ columns
    return [sums + found[GROUPS + 8 * (i // 2), 2 * PLACES + i % 2] for i, sums in enumerate(c)]


def run(text: str, operands: list[np.ndarray], results: int) -> list[np.ndarray]:
    """What the statements leave in ``results`` registers, given what is in those behind them."""
    there: dict[str, np.ndarray] = {f"${results + i}": word for i, word in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        if name == "%laneid":
            return LANES.astype(np.uint32)
        if name.startswith("0f"):
            return np.full(32, np.array(int(name[2:], 16), np.uint32).view(np.float32), float)
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.full(32, int(name, 0), np.uint32)
        return there[name]

    body = text.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, map(str.strip, body.split(";"))):
        op, rest = statement.split(None, 1)
        lists = [re.split(r"[,\s]+", one) for one in re.findall(r"\{([^}]*)\}", rest)]
        names = [name for name in re.split(r"[,\s]+", re.sub(r"[{}]", "", rest)) if name]
        if op == ".reg":
            continue
        if op.startswith("mma"):
            _, a, b, c = ([name for name in one if name] for one in lists)
            kind = op.split(".")[-2]
            sums = mma(kind, *([value(name) for name in one] for one in (a, b, c)))
            there.update(zip(c, sums, strict=True))
        elif op == "mov.b32" and rest.startswith("{"):
            both = value(names[2])
            there[names[0]], there[names[1]] = both & 0xFFFF, both >> 16
        elif op == "mov.b32" and lists:
            there[names[0]] = value(names[1]) | value(names[2]) << np.uint32(16)
        elif op.startswith("mov"):
            there[names[0]] = value(names[1])
        elif op == "cvt.rn.satfinite.e4m3x2.f32":  # the first of two to the upper byte
            high, low = (torch.from_numpy(value(name)) for name in names[1:])
            codes = torch.stack([low, high], 1).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            there[names[0]] = codes.view(np.uint16).reshape(32).astype(np.uint32)
        elif op == "cvt.rn.f16x2.e4m3x2":
            codes = np.stack([value(names[1]) & 0xFF, value(names[1]) >> 8], 1).astype(np.uint8)
            numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).half().numpy()
            there[names[0]] = numbers.view(np.uint32).reshape(32)
        elif op == "shr.b32":
            there[names[0]] = value(names[1]) >> value(names[2])
        elif op == "lop3.b32":
            assert names[4] == "0xea"
            there[names[0]] = value(names[1]) & value(names[2]) | value(names[3])
        elif op == "and.b32":
            there[names[0]] = value(names[1]) & value(names[2])
        elif op == "add.f32":
            there[names[0]] = value(names[1]) + value(names[2])
        elif op == "setp.ne.u32":
            there[names[0]] = value(names[1]) != value(names[2])
        else:
            assert op == "selp.f32", statement
            there[names[0]] = np.where(value(names[3]), value(names[1]), value(names[2]))
    return [there[f"${i}"] for i in range(results)]


def drawn(random: np.random.Generator, *shape: int) -> torch.Tensor:
    """Small whole numbers: sums of their products are exact."""
    return torch.from_numpy(random.integers(-8, 9, shape)).float()


def words(numbers: torch.Tensor) -> list[np.ndarray]:
    """Of [32, 2 n] numbers of 16 bits, or [32, 4 n] of 8, each lane's n words."""
    packed = numbers.contiguous().view(torch.int32).numpy().view(np.uint32)
    return list(packed.T)


def check(found: list[np.ndarray], wanted: list[torch.Tensor]) -> None:
    """In lane 4 g + g / 2 the first of each row's results is its group's product; zeros behind."""
    count = len(found) // len(wanted)
    for row, products in enumerate(wanted):
        of_groups = products.double().view(8, -1).sum(1).numpy()
        own = [4 * g + g // 2 for g in range(8)]
        assert [*LANES[PLACES == LANES // 8]] == own  # as `_two_sums` finds them
        np.testing.assert_array_equal(found[row * count][own], of_groups)
        for more in found[row * count + 1 : (row + 1) * count]:
            assert not more.any()


@pytest.mark.parametrize("vectors", sorted(TEXTS["_NUMBERS"]))
def test_two_rows_of_numbers_meet_x(vectors: int) -> None:
    one, other, x = (drawn(np.random.default_rng(i), 32, 8 * vectors) for i in range(3))
    operands = [word for tensor in (one, other, x) for word in words(tensor.bfloat16())]
    found = run(TEXTS["_NUMBERS"][vectors], operands, 8 * vectors)
    check(found, [one * x, other * x])


@pytest.mark.parametrize("vectors", sorted(TEXTS["_ROW"]))
def test_one_row_of_numbers_meets_x(vectors: int) -> None:
    row, x = (drawn(np.random.default_rng(i), 32, 8 * vectors) for i in range(2))
    operands = [word for tensor in (row, x) for word in words(tensor.bfloat16())]
    found = run(TEXTS["_ROW"][vectors], operands, 8 * vectors)
    check(found, [row * x, torch.zeros_like(x)])


@pytest.mark.parametrize("vectors", sorted(TEXTS["_BYTES"]))
def test_two_rows_of_e4m3_meet_x(vectors: int) -> None:
    one, other, x = (drawn(np.random.default_rng(i), 32, 16 * vectors) for i in range(3))
    fours = x.half().view(32, -1, 2, 2)
    operands = [word for codes in (one, other) for word in words(codes.to(torch.float8_e4m3fn))]
    operands += [word for i in range(2) for word in words(fours[:, :, i].reshape(32, -1))]
    found = run(TEXTS["_BYTES"][vectors], operands, 8 * vectors)
    check(found, [one * x, other * x])


def test_x_becomes_the_codes_that_are_nearest_and_then_float16() -> None:
    x = torch.empty(32, 4).uniform_(-448, 448, generator=torch.Generator().manual_seed(3))
    (word,) = run(TEXTS["_NARROWER"], [x[:, i].numpy() for i in range(4)], 1)
    nearest = x.to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(word, words(nearest)[0])
    found = run(TEXTS["_WIDER"], [word], 2)
    for one, pair in zip(found, (nearest[:, :2], nearest[:, 2:]), strict=True):
        np.testing.assert_array_equal(halves(one, "f16"), pair.double().numpy())


def test_two_rows_of_4_bits_meet_x_as_128_and_a_code() -> None:
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 16, (32, 4, 8)) for _ in range(2))
    x = drawn(random, 32, 4, 8)
    shifts = 4 * np.arange(8)
    operands = [
        (codes.astype(np.uint32) << shifts).sum(2, dtype=np.uint32)[:, word]
        for codes in (one, other)
        for word in range(4)
    ]
    for i in range(4):  # codes i and i + 4 of each word
        operands += words(torch.stack([x[:, :, i], x[:, :, i + 4]], 2).reshape(32, -1).bfloat16())
    found = run(TEXTS["_CODES"], operands, 8)
    check(found, [(torch.from_numpy(codes) + 128.0) * x for codes in (one, other)])


def test_eights_are_136() -> None:
    eights = torch.tensor([-0x77777778], dtype=torch.int32).view(torch.uint8)
    assert eights.tolist() == [0x88] * 4  # what the kernel takes 128 + n for that is too much


def test_float16_has_all_codes_of_8_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float()
    known = numbers.isfinite()
    assert torch.equal(numbers.half().float()[known], numbers[known])
