"""sample in Triton against brute force in float64: every cut, every edge, and no read past a row.

Sums in float32 may be off by EPSILON of the whole (the docstring of kernels/sample.py): a token is
right if its interval of the distribution function, widened by that, holds ``uniform``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from sample_forms import (
    EPSILON,
    INFINITY,
    NAN,
    SMALL,
    R,
    Row,
    assert_acceptable,
    call,
    calls,
    layouts_of,
    parameters,
    problem_of,
    source_of,
    wide_call,
    widened,
)
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.candidates import KERNELS
from tilewright.codegen.triton.kernels import sample
from tilewright.codegen.triton.kernels.sample import (
    SPACE,
    Tiles,
    default_tiles,
    emit_sample,
    sample_source,
)
from tilewright.codegen.triton.package import Resources
from tilewright.ir.build import input_node, make, permute
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS
from triton_bodies import run
from triton_running import SPILLED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

H100 = TARGETS["h100"]
N = symbol("N")
REFERENCE = schema("sample").reference


def tokens_of(logits: torch.Tensor, rows: list[Row], tiles: Tiles = SMALL) -> list[int]:
    """The kernel's tokens; the logits lie within rows that are wider, and NaN there."""
    dtype, (count, vocab) = DType.from_torch(logits.dtype), logits.shape
    node = wide_call(vocab, dtype)
    operands = [widened(logits), *parameters(rows)]
    (found,) = run(source_of(node, tiles), node, operands, {"R": count})
    return found.tolist()


def check(
    logits: torch.Tensor, rows: list[Row], tiles: Tiles = SMALL, epsilon: float = EPSILON
) -> None:
    assert_acceptable(logits, rows, tokens_of(logits, rows, tiles), epsilon)


@given(calls())
@settings(max_examples=12)
def test_every_row_is_brute_force(case: tuple[torch.Tensor, list[Row]]) -> None:
    check(*case)


@pytest.mark.quick
def test_greedy_rows_are_the_reference() -> None:
    logits = torch.randn(6, 100).round()
    logits[1] = -INFINITY
    logits[2, 99] = NAN
    logits[3, 0] = INFINITY
    logits[4, 1:] = -INFINITY
    logits[5] = torch.where(torch.arange(100) % 2 == 0, -0.0, 0.0)  # equal: the first
    rows: list[Row] = [(0.0, 3, 0.5, 0.1, 0.5)] * 6
    wanted = REFERENCE(logits, *parameters(rows)).tolist()
    assert wanted[1:4] == [-1, -1, -1] and wanted[5] == 0
    assert tokens_of(logits, rows) == wanted


CUTS: dict[str, tuple[int, float, float]] = {
    "none": (0, 1.0, 0.0),
    "min-p": (0, 1.0, 0.05),
    "top-k": (7, 1.0, 0.0),
    "a large top-k": (70, 1.0, 0.0),
    "top-p": (0, 0.7, 0.0),
    "top-p and min-p": (0, 0.9, 0.02),
    "all": (20, 0.8, 0.05),
}


@pytest.mark.quick
@pytest.mark.parametrize("cut", CUTS)
def test_each_cut_over_the_whole_unit_interval(cut: str) -> None:
    """Rows that differ in ``uniform`` alone."""
    row = (torch.randn(90) * 1.5).bfloat16()
    uniforms = [0.0, 0.2, 0.5, 0.8, 1 - 2**-24]
    check(row.repeat(5, 1), [(0.8, *CUTS[cut], u) for u in uniforms])


@pytest.mark.parametrize("cut", ["top-k", "top-p", "all"])
def test_what_no_list_holds_is_searched_in_the_row(
    cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_CAPACITY", 16)
    logits = (torch.randn(2, 150) * 0.2).bfloat16()
    k, p, m = CUTS[cut]
    check(logits, [(2.0, k and 100, p, m, u) for u in (0.3, 0.99)])


def test_tokens_far_below_the_first_ones_are_no_error() -> None:
    """Their probability is 0 in float32; ``uniform`` of 0 takes the first that has one."""
    logits = torch.full((2, 128), -100.0)
    logits[:, 100] = 20.0
    logits[:, 70] = 19.0
    assert tokens_of(logits, [(1.0, 0, 1.0, 0.0, 0.0), (1.0, 0, 1.0, 1e-9, 0.0)]) == [70, 70]


def test_padding_with_any_parameters_is_harmless() -> None:
    """A token or -1 for each row, whatever stands in it."""
    noise = torch.randint(0, 256, (8, 40 * 4)).to(torch.uint8).view(torch.float32)
    noise[4:] = torch.randn(4, 40)
    rows: list[Row] = [
        (NAN, -5, NAN, NAN, NAN),
        (1.0, 2**31 - 1, -1.0, 7.0, 2.0),
        (1e-45, -(2**31), 0.0, -1.0, -1.0),
        (INFINITY, 3, INFINITY, INFINITY, INFINITY),
    ] * 2
    found = tokens_of(noise, rows)
    assert min(found) >= -1 and min(found[4:]) >= 0 and max(found) < 40


def test_a_row_alone_and_in_a_batch_is_the_same() -> None:
    logits = (torch.randn(3, 90) * 2).bfloat16()
    rows: list[Row] = [(1.0, 0, 0.8, 0.0, 0.3 + 0.2 * i) for i in range(3)]
    alone = [tokens_of(logits[i : i + 1], rows[i : i + 1])[0] for i in range(3)]
    assert tokens_of(logits, rows) == alone


@pytest.mark.parametrize("tiles", [Tiles(16, 128, 4, 1), Tiles(128, 32, 4, 2)])
def test_any_tiles(tiles: Tiles) -> None:
    logits = torch.randn(3, 130).bfloat16()
    check(
        logits, [(1.0, 9, 1.0, 0.0, 0.4), (1.0, 0, 0.6, 0.1, 0.9), (0.7, 0, 1.0, 0.0, 0.6)], tiles
    )


def test_a_large_vocabulary_with_the_default_tiles() -> None:
    logits = torch.randn(3, 20_000).bfloat16()
    problem = problem_of(call(20_000, DType.BF16))
    assert problem is not None
    rows: list[Row] = [(1.0, 0, 1.0, 0.0, 0.77), (1.0, 0, 0.9, 0.0, 0.5), (1.0, 30, 0.9, 0.0, 0.5)]
    check(logits, rows, default_tiles(problem))


def test_the_error_of_sums_is_far_below_what_is_stated() -> None:
    """Flat rows, where rounding adds up, and ``uniform`` at the end of an interval."""
    logits = torch.rand(4, 30_000)
    mass = logits.double().softmax(-1).cumsum(-1)
    uniforms = [float(mass[i, t]) for i, t in enumerate((4000, 12_000, 20_000, 29_000))]
    rows: list[Row] = [(1.0, 0, 1.0, i % 2 * 1e-9, u) for i, u in enumerate(uniforms)]
    check(logits, rows, Tiles(1024, 4096, 4, 1), EPSILON / 4)


def wide_slice(dtype: DType) -> Node:
    """Rows with a stride of two."""
    base = input_node("base", TensorType(dtype, (R, 64)))
    return make("slice", base, dim=1, start=0, stop=64, step=2)


@pytest.mark.parametrize(
    "node",
    [
        call(32, DType.F64),
        call(N, DType.F32),
        call((1 << 24) + 1, DType.BF16),
        call(32, DType.F32, wide_slice(DType.F32)),
        call(32, DType.F32, permute(input_node("x", TensorType(DType.F32, (32, R))), 1, 0)),
    ],
)
def test_what_it_declines(node: Node) -> None:
    assert emit_sample(node, layouts_of(node), H100) is None


def test_a_strided_parameter_is_declined() -> None:
    node = call(32, DType.F32)
    layouts = list(layouts_of(node))
    layouts[3] = replace(layouts[3], strides=(2,))
    assert emit_sample(node, tuple(layouts), H100) is None


@pytest.mark.parametrize(("target", "pdl"), [("h100", True), ("b200", True), ("a100", False)])
def test_launches_depend_programmatically_where_the_target_does(target: str, pdl: bool) -> None:
    node = call(32, DType.BF16)
    (emit,) = KERNELS["sample"]
    source = emit(node, layouts_of(node), TARGETS[target])
    assert source is not None
    assert [launch.pdl for launch in source.variants[0].launches] == [pdl, pdl]


def resources_of(cases: list[tuple[int, DType]], arch: int) -> list[list[Resources]]:
    """Of both launches with the default tiles."""
    sources = []
    for vocab, dtype in cases:
        problem = problem_of(call(vocab, dtype))
        assert problem is not None
        sources.append(sample_source(problem, default_tiles(problem), arch >= 90))
    return [list(package.resources) for package in compile_sources(sources, arch)]


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        (128_256, DType.BF16),
        *(
            pytest.param(vocab, dtype, marks=pytest.mark.nightly)
            for vocab, dtype in ((128_256, DType.F32), (128_256, DType.F16), (50_257, DType.F16))
        ),
    ],
)
def test_no_spills_on_an_h100(vocab: int, dtype: DType) -> None:
    ((first, second),) = resources_of([(vocab, dtype)], 90)
    assert max(first.spills, second.spills) <= SPILLED
    assert first.registers <= 64  # greedy rows: full occupancy


@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 100])
def test_every_architecture_compiles_it(arch: int) -> None:
    (resources,) = resources_of([(128_256, DType.BF16)], arch)
    assert [taken.spills for taken in resources] == [0, 0]


def test_the_largest_tiles_of_the_space_fit_the_smallest_shared_memory() -> None:
    largest = Tiles(*(max(values) for values in SPACE.values()))
    (package,) = compile_sources([source_of(call(9000, DType.F32), largest)], 89)
    assert max(taken.shared for taken in package.resources) <= TARGETS["l4"].shared_memory_per_block
