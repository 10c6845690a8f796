"""Operations on others' packed tensors, and the parts found again in what they make."""

from __future__ import annotations

import pytest
import torch

from tilewright.errors import CheckpointError, GraphError
from tilewright.formats import Held, apply_weight, parse_weight
from tilewright.formats.stored_codes import StoredCodes, codes_of, grid_of


def _held(name: str, tensor: torch.Tensor) -> Held:
    return Held(tensor, name)


def _codes(name: str, rows: int = 4, **more: object) -> StoredCodes:
    generator = torch.Generator().manual_seed(len(name))
    codes = torch.randint(0, 16, (rows, 6), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, 2, generator=generator) + 0.5
    return StoredCodes(_held(f"{name}.c", codes), _held(f"{name}.s", scale), group=4, **more)


def _truth(stored: StoredCodes) -> torch.Tensor:
    codes, scale = stored.codes.load().double(), stored.scale.load().double()
    zero = torch.full_like(scale, 8) if stored.zero is None else stored.zero.load().double()
    group = [0, 0, 0, 0, 1, 1]
    return (codes - zero[:, group]) * scale[:, group]


@pytest.mark.parametrize("dim", [0, 1])
def test_words_are_taken_apart_from_the_lowest_bits_on(dim: int):
    words = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    weight = _held("w", words if dim == 1 else words.T.contiguous())
    found = apply_weight("unpack_int32", (weight,), bits=4, dim=dim, offset=1)
    wanted = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, *[0] * 8]], dtype=torch.uint8)
    assert torch.equal(found.load(), wanted if dim == 1 else wanted.T)
    assert found.shape == tuple(found.load().shape)
    found = apply_weight("unpack_int32", (weight,), bits=8, dim=dim, offset=128)
    assert found.load().flatten().tolist() == [0x90, 0xB2, 0xD4, 0xF6, *[0x7F] * 4]


def test_text_comes_back():
    order = _held("o", torch.tensor([1, 0, 0, 1, 1, 0]))
    static = _held("i", torch.tensor([0.5]))
    by_order = apply_weight("argsort", (order,))
    stored = _codes("a", order=by_order, rounds=torch.int8, static=static)
    weight = apply_weight("finite", (stored.weight(),))
    leaves = {leaf.name: leaf for leaf in (stored.codes, stored.scale, order, static)}
    assert parse_weight(str(weight), leaves.__getitem__) == weight


def test_parts_are_found_in_what_passes_make():
    a, b = _codes("a"), _codes("bb", 2)
    both = apply_weight("concat", (a.weight(), b.weight()), dim=0)
    cut = apply_weight("slice", (both,), dim=0, start=3, stop=5)
    found = codes_of(apply_weight("cast", (cut,), dtype=torch.bfloat16))
    wanted = torch.cat([_truth(a), _truth(b)])[3:5]
    assert found is not None and found.zero is None and found.group == 4
    torch.testing.assert_close(_truth(found), wanted)
    torch.testing.assert_close(cut.load().double(), wanted, rtol=1e-6, atol=1e-6)


def test_codes_in_another_order_stand_for_the_same_columns():
    order = _held("o", torch.tensor([3, 0, 5, 1, 4, 2]))
    stored = _codes("a", order=order)
    assert codes_of(stored.weight()) == stored
    found = torch.empty(4, 6, dtype=torch.float64)
    found[:, order.load()] = _truth(stored)
    torch.testing.assert_close(stored.weight().load().double(), found, rtol=1e-6, atol=1e-6)


def test_other_grids_and_other_operations_have_no_parts():
    a = _codes("a")
    zero = _held("z", torch.full((4, 2), 3, dtype=torch.uint8))
    other = _codes("b", zero=zero)
    assert grid_of(a.weight()) != grid_of(other.weight())
    assert codes_of(apply_weight("concat", (a.weight(), other.weight()), dim=0)) is None
    plain = _held("p", torch.zeros(4, 6))
    assert codes_of(apply_weight("concat", (a.weight(), plain), dim=0)) is None
    assert codes_of(apply_weight("mul", (a.weight(), 2.0))) is None
    assert codes_of(apply_weight("permute", (a.weight(),), dims=(1, 0))) is None
    assert codes_of(plain) is None


def test_a_weight_that_is_turned_twice_is_itself():
    a = _codes("a")
    turned = apply_weight("permute", (a.weight(),), dims=(1, 0))
    assert codes_of(apply_weight("permute", (turned,), dims=(1, 0))) == a


def test_numbers_that_are_not_finite_are_named():
    scale = _held("layer.scales", torch.tensor([1.0, float("nan")]))
    with pytest.raises(CheckpointError, match=r"layer\.scales"):
        apply_weight("finite", (scale,)).load()


@pytest.mark.parametrize(
    ("op", "shapes", "attrs"),
    [
        ("unpack_int32", [(2, 2)], {"bits": 3, "dim": 0, "offset": 0}),
        ("unpack_int32", [(2, 2)], {"bits": 4, "dim": 0, "offset": 16}),
        ("argsort", [(2, 2)], {}),
        ("take", [(2, 2), (2,)], {"dim": 1}),
        ("dequantize_codes", [(2, 8), (2, 3)], {"dtype": torch.float32, "rows": 1, "group": 4}),
        ("meets_codes", [(2, 8), (2,)], {"dtype": torch.int8, "group": 0}),
        ("meets_codes", [(2, 8)], {"dtype": torch.float16, "group": 0}),
    ],
    ids=["bits", "offset", "matrix", "index", "scales", "static", "dtype"],
)
def test_what_does_not_fit_is_refused(op: str, shapes: list, attrs: dict):
    held = tuple(
        _held(str(i), torch.zeros(shape, dtype=torch.int32)) for i, shape in enumerate(shapes)
    )
    with pytest.raises(GraphError, match=op):
        apply_weight(op, held, **attrs)
