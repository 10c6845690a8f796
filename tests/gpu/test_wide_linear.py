"""Products of many tokens on a GPU, against float64: whole tiles, and steps that programs share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu_kernels import here, on_device, poisoned_kernels
from linear_forms import Form, assert_close, body_of, in_float64, node_of, operands_of, problem_of
from tilewright.codegen.triton.kernels.wide_linear import wide_source
from tilewright.codegen.triton.kernels.wide_linear_tiles import (
    WideTiles,
    default_wide,
    takes_tiles,
    takes_wide,
)
from tilewright.codegen.triton.source import KernelSource
from tilewright.codegen.triton.tuning.beside_library import is_library
from tilewright.codegen.triton.tuning.problems import WIDE
from tilewright.codegen.triton.tuning.runner import KernelRunner
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.ir.dtypes import DType

pytestmark = pytest.mark.gpu
TOKENS = (1, 300, 512, 777)
FORMS = [
    Form(4096, 14336, DType.BF16, halves=True),
    Form(1000, 1048, DType.BF16, halves=True),
    Form(1000, 1048, DType.F16, halves=True, behind=("scaled",)),
    Form(4096, 6144, DType.BF16),
    Form(3584, 1024, DType.BF16, behind=("residual",)),
    Form(1000, 520, DType.F16, "bare", bias=True, behind=("gelu", "columns")),
    Form(1016, 40, DType.BF16, "weight", bias=True, halves=True, behind=("rows",)),
    Form(1016, 2048, DType.BF16, strided=True),
]
CUTS = (
    WideTiles(128, 128, 64, 8, 4, 4, flat=True),
    WideTiles(128, 128, 64, 8, 4, 4, flat=False, shared=True),
    WideTiles(256, 128, 64, 8, 8, 3, strips=2, flat=False, shared=True),
)


def source_of(form: Form, tiles: WideTiles | None) -> KernelSource:
    problem = problem_of(node_of(form))
    assert problem is not None and takes_wide(problem, here())
    tiles = tiles or default_wide(problem)
    if problem.parts == 2:
        tiles = replace(tiles, strips=1, block_n=min(tiles.block_n, 256 // 2))
    if not takes_tiles(problem, tiles, here()):
        tiles = replace(tiles, block_n=tiles.block_n // 2)
    assert takes_tiles(problem, tiles, here())
    return wide_source(problem, here(), tiles)


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if here().arch != 90:
        pytest.skip("the kernel is for Hopper alone")


@pytest.mark.parametrize("shared", [False, True])
def test_the_default_is_the_body_in_float64(shared: bool) -> None:
    sources = []
    for form in FORMS:
        problem = problem_of(node_of(form))
        assert problem is not None
        tiles = replace(default_wide(problem), shared=shared, flat=not shared)
        sources.append((source_of(form, tiles), node_of(form)))
    check(sources, FORMS)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_other_cuts_are_the_body_in_float64(cut: WideTiles) -> None:
    check([(source_of(form, cut), node_of(form)) for form in FORMS[2:5]], FORMS[2:5])


def check(sources: list, forms: list[Form]) -> None:
    for form, kernel in zip(forms, poisoned_kernels(sources), strict=True):
        for tokens in TOKENS:
            bases, operands = operands_of(form, tokens, device="cuda")
            (found,) = kernel([on_device(base) for base in bases], {"B": tokens})
            assert_close(form, found, in_float64(body_of(form), operands))


def test_the_tuner_checks_and_times_our_cuts_and_the_library() -> None:
    one = KernelTunable.of(WIDE, node_of(Form(1024, 4224, DType.BF16)), {"B": 512}, here())
    cuts = [c for c in one.space.configs() if not is_library(c) and c["block_m"] == 128]
    shared = next(c for c in cuts if c["shared"])
    whole = next(c for c in cuts if not c["shared"])
    runner = KernelRunner(one.runner.spec)
    for config in (*one.pinned, whole, shared):
        runner.prepare(config)
        assert runner.check(config) <= 1
        assert all(1e-7 < seconds < 1e-2 for seconds in runner.time(config, 3))


def test_shared_steps_give_the_same_bits_every_time() -> None:
    """Whoever comes first: parts are added up in their order, beside other work or alone."""
    form = Form(4096, 6144, DType.BF16)
    tiles = WideTiles(128, 256, 64, 8, 8, 3, flat=False, shared=True)
    (kernel,) = poisoned_kernels([(source_of(form, tiles), node_of(form))])
    bases, _ = operands_of(form, 512, device="cuda")
    given = [on_device(base) for base in bases]
    (first,) = kernel(given, {"B": 512})
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            busy = torch.tanh(busy @ busy)
        (again,) = kernel(given, {"B": 512})
        assert torch.equal(first, again)
