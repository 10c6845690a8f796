"""The tuner on a GPU: real workers, real kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_kernels import here
from linear_forms import Form
from linear_forms import node_of as linear_node
from paged_forms import Shape, decode_call, ragged_call
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import tune
from tilewright.codegen.triton.tuning.attention import prefill_sizes
from tilewright.codegen.triton.tuning.decode import mixed_sizes, sizes_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.runner import KernelRunner
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.codegen.triton.tuning.walks import row_sizes
from tilewright.ir.dtypes import DType
from walk_forms import gated_call, norm_call

pytestmark = pytest.mark.gpu
EFFORT = replace(EFFORTS["quick"], candidates=6, trials=6, share=1.0)


def problems() -> list[KernelTunable]:
    form = Form(k=2048, n=1024, norm="weight", behind=("residual",), dtype=DType.BF16)
    linear = linear_node(form)
    decode = decode_call(Shape(head_dim=128, value_dim=128, page=16, dtype=DType.BF16))
    return [
        KernelTunable.of(template_named("linear_gemv"), linear, {"B": 1}, here()),
        KernelTunable.of(template_named("linear_gemm"), linear, {"B": 16}, here()),
        KernelTunable.of(template_named("paged_decode"), decode, sizes_of(decode, 4, 512), here()),
    ]


def other_problems() -> list[KernelTunable]:
    """Attention and generated kernels, as a model has them, but small."""
    shape = Shape(head_dim=128, value_dim=128, page=16, dtype=DType.BF16)
    decode, prefill = decode_call(replace(shape, paged=True)), ragged_call(shape)
    norm, gated = norm_call(2048), gated_call(4096)
    found = [
        ("paged_decode", decode, mixed_sizes(decode, 1, 2048)),
        ("paged_decode", decode, mixed_sizes(decode, 8, 2048)),
        ("paged_attention", prefill, prefill_sizes(prefill, 512)),
        ("rows", norm, row_sizes(norm, 128)),
        ("elementwise", gated, row_sizes(gated, 128)),
    ]
    return [
        KernelTunable.of(template_named(name), node, sizes, here()) for name, node, sizes in found
    ]


def hold(tunable: KernelTunable, pool: Pool) -> None:
    """What is tried is right, and what is chosen no slower than the default."""
    tuned = tune(tunable, EFFORT, pool)
    states = {str(o.config): (o.status, o.reason) for o in tuned.outcomes}
    assert {status for status, _ in states.values()} <= {"ok", "refused", "too_slow"}, states
    choice = tuned.choice
    assert choice.seconds is not None and choice.default_seconds is not None
    assert choice.seconds <= 1.02 * choice.default_seconds


def test_every_config_that_is_tried_is_right_and_the_choice_no_slower() -> None:
    with Pool() as pool:
        for tunable in problems():
            hold(tunable, pool)
        assert pool.starts == 1


def test_attention_and_generated_kernels_are_tuned_as_products_are() -> None:
    with Pool() as pool:
        for tunable in other_problems():
            hold(tunable, pool)
        assert pool.starts == 1


def test_calls_for_one_sequence_see_many_lengths() -> None:
    runner = KernelRunner(other_problems()[0].runner.spec)
    lengths = {int(operands[4].max()) for operands in runner.operands if operands[4] is not None}
    assert len(lengths) >= 8


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = problems()[1]
    runner = KernelRunner(tunable.runner.spec)
    runner.prepare(tunable.default)
    assert runner.check(tunable.default) <= 1
    assert all(1e-7 < seconds < 1e-2 for seconds in runner.time(tunable.default, 3))
    runner.expected = [value + value.abs().max() for value in runner.expected]
    assert runner.check(tunable.default) > 1
