"""Prefill attention of warp groups on a GPU, against float64: ragged batches with rows of decodes,
chunks behind a prefix, windows and any pages, in poisoned memory; and what each kind of steps has
by default.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from gpu_kernels import PoisonedKernel, here, on_device, poisoned_kernels
from paged_forms import OP, Shape, layouts_of, ragged_call, ragged_operands, truth
from tilewright.codegen.triton.kernels.hopper_attention import ROWS, WARPS, takes_tiles, why_not
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention, prefill_source
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem, Tiles
from tilewright.codegen.triton.kernels.prefill_steps import default_prefill, steps_at
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node

pytestmark = pytest.mark.gpu
WIDE = Shape(group=4, kv_heads=2, head_dim=128, value_dim=128, page=16, dtype=DType.BF16)
NARROW = replace(WIDE, head_dim=64, value_dim=64, dtype=DType.F16)
Cut = tuple[int, int, bool]  # keys of a tile, stages, whether programs begin at both ends
FORMS: list[tuple[Shape, dict[str, object], Cut]] = [
    (WIDE, {}, (128, 2, False)),
    (WIDE, {}, (64, 4, True)),
    (WIDE, {"window": 100}, (128, 2, False)),
    (WIDE, {"window": 300}, (64, 3, False)),
    (WIDE, {"window": 90}, (64, 4, True)),
    (WIDE, {"causal": False}, (128, 2, True)),
    (replace(WIDE, group=1), {}, (128, 2, False)),
    (replace(WIDE, group=1), {"causal": False}, (64, 4, True)),
    (replace(WIDE, group=32, kv_heads=1), {}, (128, 2, False)),
    (replace(WIDE, group=8, page=32, paged=True), {}, (64, 4, True)),
    (replace(WIDE, page=128, paged=True), {"window": 20}, (128, 2, False)),
    (NARROW, {}, (128, 3, False)),
    (replace(NARROW, group=16, kv_heads=1), {"causal": False}, (64, 4, False)),
    (replace(NARROW, page=64, paged=True, group=2), {"window": 1}, (64, 2, True)),
]
BATCHES: list[tuple[list[tuple[int, int]], int]] = [  # (tokens before, tokens now), padding
    ([(0, 700)], 0),
    ([(0, 1)], 0),
    ([(1099, 1)] * 5 + [(0, 300), (0, 65)], 0),
    ([(0, 300), (773, 160), (0, 0), (69, 1), (64, 64), (1, 128)], 9),
    ([(b % 50, b % 3) for b in range(140)], 40),
    ([(4000, 513)], 1),
]
DEFAULTS = [  # of prefill_steps.py, with what comes before and without
    ("few", [(0, 130)], 6),
    ("few", [(8000, 128), (0, 200)], 0),
    ("few", [(7680, 512)], 0),
    ("mixed", [(1023, 1)] * 30 + [(0, 96), (7, 96)], 0),
    ("mixed", [(1023, 1)] * 30 + [(0, 500), (200, 300)], 0),
    ("mixed", [(0, 433), (64, 128)] + [(5000, 1)] * 9, 7),
    ("usual", [(0, 1024)], 0),
    ("usual", [(6000, 600)], 12),
    ("usual", [(0, 700), (300, 600), (0, 512)], 0),
    ("long", [(0, 2048)], 0),
    ("long", [(5000, 4100)], 60),
]


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if here().arch != 90:
        pytest.skip("the kernel is for Hopper alone")


@cache
def kernels() -> list[tuple[Shape, Node, PoisonedKernel]]:
    """Of each form, compiled side by side."""
    calls = []
    for shape, attrs, (block_n, stages, both_ways) in FORMS:
        node = ragged_call(shape, **attrs)
        problem = Problem.of(node, layouts_of(node))
        tiles = Tiles(ROWS, block_n, WARPS, stages, here().sms, both_ways)
        assert problem is not None and why_not(problem, here()) is None
        assert takes_tiles(problem, tiles, here())
        calls.append((prefill_source(problem, tiles), node))
    pairs = zip(FORMS, calls, poisoned_kernels(calls), strict=True)
    return [(shape, node, kernel) for (shape, _, _), (_, node), kernel in pairs]


@pytest.mark.parametrize("batch", range(len(BATCHES)))
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_it_is_the_reference(form: int, batch: int) -> None:
    shape, node, kernel = kernels()[form]
    torch.manual_seed(batch)
    operands, sizes = ragged_operands(shape, *BATCHES[batch])
    given = [on_device(x) for x in operands]
    wanted = truth(shape, node, given)
    relative, absolute = OP.tolerance[shape.dtype]
    for _ in range(2):  # what a launch leaves behind is nothing to the next one
        (found,) = kernel(given, sizes)
        torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


@cache
def defaults() -> list[tuple[Shape, Node, PoisonedKernel]]:
    """What heads of 128 and of 64 have untuned, for any steps."""
    shapes = [replace(WIDE, kv_heads=4), replace(NARROW, kv_heads=4, dtype=DType.BF16)]
    calls = []
    for shape in shapes:
        node = ragged_call(shape)
        source = emit_paged_attention(node, layouts_of(node), here())
        assert source is not None
        calls.append((source, node))
    pairs = zip(shapes, calls, poisoned_kernels(calls), strict=True)
    return [(shape, node, kernel) for shape, (_, node), kernel in pairs]


@pytest.mark.parametrize("kind, batch, padding", DEFAULTS)
@pytest.mark.parametrize("which", (0, 1), ids=("128", "64"))
def test_the_default_of_a_step_is_the_reference(
    which: int, kind: str, batch: list[tuple[int, int]], padding: int
) -> None:
    shape, node, kernel = defaults()[which]
    operands, sizes = ragged_operands(shape, batch, padding)
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    steps = steps_at(problem, here(), sizes)
    assert steps.name == kind
    tiles = default_prefill(problem, here(), steps)
    (launch,) = (launch for launch, _, _ in kernel._plan(sizes).launches)
    assert tiles is not None and launch.constexprs["BLOCK_N"] == tiles.block_n
    assert (launch.function == "prefill") == bool(tiles.programs)
    given = [on_device(x) for x in operands]
    (found,) = kernel(given, sizes)
    relative, absolute = OP.tolerance[shape.dtype]
    wanted = truth(shape, node, given)
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


@pytest.mark.parametrize("both_ways", (False, True))
def test_one_program_does_it_all(both_ways: bool) -> None:
    node = ragged_call(WIDE)
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    tiles = Tiles(ROWS, 64 if both_ways else 128, WARPS, 2, 1, both_ways)
    (kernel,) = poisoned_kernels([(prefill_source(problem, tiles), node)])
    operands, sizes = ragged_operands(WIDE, [(30, 200), (0, 77)])
    given = [on_device(x) for x in operands]
    (found,) = kernel(given, sizes)
    torch.testing.assert_close(found.double(), truth(WIDE, node, given), rtol=0.03, atol=0.03)


def test_rows_that_see_nothing_give_zero() -> None:
    shape, _, kernel = kernels()[0]
    operands, sizes = ragged_operands(shape, [(4, 300), (0, 9)], padding=150)
    operands[5] += 50  # rows before the first sequence, too
    (found,) = kernel([on_device(x) for x in operands], sizes)
    assert not found[:50].any() and not found[359:].any() and found[50:359].isfinite().all()
    operands[4].zero_()  # a captured step of idle sequences
    (found,) = kernel([on_device(x) for x in operands], sizes)
    assert not found.any()


def test_a_nan_stays_in_its_row() -> None:
    shape, _, kernel = kernels()[0]
    operands, sizes = ragged_operands(shape, [(40, 200)])
    operands[0][70, 3, 0] = torch.nan
    (found,) = kernel([on_device(x) for x in operands], sizes)
    assert found.isnan().any(-1).nonzero().tolist() == [[70, 3]]


def test_pages_before_the_window_are_not_read() -> None:
    shape, node, kernel = kernels()[2]
    operands, sizes = ragged_operands(shape, [(700, 40), (500, 1)])
    wanted = truth(shape, node, [on_device(x) for x in operands])
    for row, before in enumerate((700, 500)):
        freed = (before - 99) // 16  # pages that hold no key of any window
        for held in operands[1:3]:
            held[operands[3][row, :freed].long()] = torch.nan
        operands[3][row, : freed // 2] = 1 << 30
    (found,) = kernel([on_device(x) for x in operands], sizes)
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03)


def test_page_ids_outside_the_cache_are_not_followed() -> None:
    shape, _, kernel = kernels()[0]
    operands, sizes = ragged_operands(shape, [(90, 41)])
    for held in operands[1:3]:
        held.nan_to_num_(1.0)
    operands[3][0, :2] = torch.tensor([1 << 30, -(1 << 30)])
    (found,) = kernel([on_device(x) for x in operands], sizes)
    assert found.isfinite().all()
