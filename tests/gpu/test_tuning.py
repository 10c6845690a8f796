"""The tuner on a GPU: real workers, real kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tilewright as tw
from gpu_kernels import here
from linear_forms import Form
from linear_forms import node_of as linear_node
from paged_forms import Shape, decode_call
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import tune
from tilewright.codegen.triton.tuning.decode import sizes_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.runner import KernelRunner
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.compiler.confirm import recut
from tilewright.compiler.confirm_steps import DecodeSteps
from tilewright.ir.dtypes import DType
from tiny_models import tiny_model

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


def test_every_config_that_is_tried_is_right_and_the_choice_no_slower() -> None:
    with Pool() as pool:
        for tunable in problems():
            tuned = tune(tunable, EFFORT, pool)
            states = {str(o.config): (o.status, o.reason) for o in tuned.outcomes}
            assert {status for status, _ in states.values()} <= {"ok", "refused", "too_slow"}, (
                states
            )
            choice = tuned.choice
            assert choice.seconds is not None and choice.default_seconds is not None
            assert choice.seconds <= 1.02 * choice.default_seconds
        assert pool.starts == 1


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = problems()[1]
    runner = KernelRunner(tunable.runner.spec)
    runner.prepare(tunable.default)
    assert runner.check(tunable.default) <= 1
    assert all(1e-7 < seconds < 1e-2 for seconds in runner.time(tunable.default, 3))
    runner.expected = [value + value.abs().max() for value in runner.expected]
    assert runner.check(tunable.default) > 1


def test_steps_of_two_choices_run_beside_each_other_and_load_anew() -> None:
    """One set of weights and caches serves both sides; the same kernels take the same time."""
    model = tiny_model("llama").to(torch.bfloat16)
    image = tw.compile(model, max_batch_size=20, max_model_len=64, tune="none").image
    steps = DecodeSteps(image, recut(image, None), [1, 20])
    for _ in range(2):
        for batch in (1, 20):
            old, new = (
                min(steps.seconds(side, batch) for _ in range(20)) for side in ("old", "new")
            )
            assert 1e-6 < old < 1e-2 and new == pytest.approx(old, rel=0.2)
        steps.reload()
    assert steps.first == "old"
