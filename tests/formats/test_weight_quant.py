"""Round-to-nearest codes of weights: against a loop over blocks, and on weights that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import CheckpointError, GraphError
from tilewright.formats import FOLDABLE, Held, apply_weight, parse_weight

pytestmark = pytest.mark.quick

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 20))


def _weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scale(x: Held, dtype: torch.dtype, rows: int, group: int):
    return apply_weight("quantize_scale", (x,), dtype=dtype, rows=rows, group=group)


def _blocks(x: np.ndarray, rows: int, group: int):
    high, across = rows or x.shape[0], group or x.shape[1]
    for i in range(0, x.shape[0], high):
        for j in range(0, x.shape[1], across):
            yield i // high, j // across, x[i : i + high, j : j + across]


@given(SIZES, st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 2, 8]), st.integers(0, 99))
def test_int8_codes_are_within_half_a_step(shape, rows: int, group: int, seed: int):
    x = Held(_weight(shape, seed), "w")
    scale = _scale(x, torch.int8, rows, group)
    codes = apply_weight("quantize_codes", (x, scale), dtype=torch.int8, rows=rows, group=group)
    loaded, scales = codes.load().numpy(), scale.load().numpy()
    assert (codes.shape, scale.shape) == (loaded.shape, scales.shape)
    wide = x.tensor.double().numpy()
    for (i, j, block), (_, _, found) in zip(
        _blocks(wide, rows, group), _blocks(loaded, rows, group), strict=True
    ):
        assert scales[i, j] == pytest.approx(abs(block).max() / 127, rel=1e-6)
        assert abs(block - found * float(scales[i, j])).max() <= scales[i, j] * 0.5001


@given(SIZES, st.sampled_from([0, 2, 8]), st.booleans(), st.integers(0, 99))
def test_four_bit_codes_are_packed_low_half_first(shape, group: int, symmetric: bool, seed: int):
    x = Held(_weight(shape, seed), "w")
    if symmetric:
        scale = _scale(x, torch.uint8, 1, group)
        parts = [scale]
    else:
        scale = apply_weight("quantize_range", (x,), group=group)
        parts = [scale, apply_weight("quantize_zero", (x, scale), group=group)]
    codes = apply_weight("quantize_codes", (x, *parts), dtype=torch.uint8, rows=1, group=group)
    packed = apply_weight("pack_codes", (codes,), group=group)
    found = packed.load().numpy()
    assert packed.shape == found.shape
    halves = np.stack([found % 16, found // 16], -1).reshape(shape[0], -1)[:, : shape[1]]
    assert (halves == codes.load().numpy()).all()
    middle = np.full((shape[0], 1), 8.0) if symmetric else parts[1].load().double().numpy()
    step = scale.load().double().numpy()
    if group:
        step = np.repeat(step, group, 1)[:, : shape[1]]
        middle = middle if symmetric else np.repeat(middle, group, 1)[:, : shape[1]]
    error = abs((halves - middle) * step - x.tensor.double().numpy())
    assert (error <= step * (0.5001 if symmetric else 1.0001)).all()


def test_fp8_saturates_and_zero_blocks_give_zeros():
    x = torch.zeros(2, 4)
    x[0] = torch.tensor([1.0, -2.0, 0.5, 0.25])
    weight = Held(x, "w")
    scale = _scale(weight, torch.float8_e4m3fn, 1, 2)
    codes = apply_weight(
        "quantize_codes", (weight, scale), dtype=torch.float8_e4m3fn, rows=1, group=2
    )
    assert torch.equal(scale.load(), torch.tensor([[2 / 448, 0.5 / 448], [1.0, 1.0]]))
    assert codes.load().float().tolist() == [[224.0, -448.0, 448.0, 224.0], [0.0] * 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float):
    good, broken = Held(torch.ones(2, 4), "layers.0.q"), torch.ones(2, 4)
    broken[1, 2] = bad
    both = apply_weight("concat", (good, Held(broken, "layers.0.k")), dim=0)
    with pytest.raises(CheckpointError, match=r'held\("layers.0.k"\)'):
        _scale(both, torch.int8, 1, 0).load()


@pytest.mark.parametrize(
    ("op", "shapes", "attrs"),
    [
        ("quantize_scale", [(4,)], {"dtype": torch.int8, "rows": 1, "group": 0}),
        ("quantize_scale", [(4, 4)], {"dtype": torch.int16, "rows": 1, "group": 0}),
        ("quantize_codes", [(4, 4), (4, 2)], {"dtype": torch.int8, "rows": 1, "group": 0}),
        ("quantize_codes", [(4, 4)] + [(4, 1)] * 2, {"dtype": torch.int8, "rows": 1, "group": 0}),
        ("quantize_zero", [(4, 4), (4, 1)], {"group": 2}),
        ("pack_codes", [(4, 4)], {"group": 2}),
    ],
)
def test_what_does_not_fit_is_refused(op: str, shapes, attrs):
    weights = tuple(Held(torch.ones(shape), f"w{i}") for i, shape in enumerate(shapes))
    with pytest.raises(GraphError):
        apply_weight(op, weights, **attrs)


def test_expressions_parse_back_and_are_not_folded():
    x = Held(_weight((3, 4)), "w")
    scale = apply_weight("cast", (_scale(x, torch.uint8, 1, 2),), dtype=torch.bfloat16)
    codes = apply_weight("quantize_codes", (x, scale), dtype=torch.uint8, rows=1, group=2)
    packed = apply_weight("pack_codes", (codes,), group=2)
    assert parse_weight(str(packed), lambda name: x) == packed
    assert not FOLDABLE & {"quantize_scale", "quantize_codes", "pack_codes"}
