"""The tuner on a GPU: real workers, real kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import tilewright as tw
from gpu_kernels import here
from handed_forms import drawn, graph_of, product_of, truth
from linear_forms import ERROR, B, Form, tensor
from linear_forms import node_of as linear_node
from paged_forms import Shape, decode_call, ragged_call
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import tune
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.linear_tiles import Cutting
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.library import ATTENTIONS
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.tuning.attention import prefill_sizes
from tilewright.codegen.triton.tuning.beside_library import is_library
from tilewright.codegen.triton.tuning.decode import mixed_sizes, sizes_of
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.runner import KernelRunner
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.codegen.triton.tuning.walks import row_sizes
from tilewright.compiler.confirm import recut
from tilewright.compiler.confirm_steps import DecodeSteps
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.runtime.runner import ProgramRunner
from tiny_models import tiny_model
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


@pytest.mark.parametrize("tokens", [1, 16])
def test_the_library_is_a_candidate_that_is_right(tokens: int) -> None:
    tunable = problems()[0 if tokens == 1 else 1]
    with Pool() as pool:
        tuned = tune(tunable, EFFORT, pool)
    (library,) = (o for o in tuned.outcomes if is_library(o.config))
    assert library.status == "ok" and library.seconds, library
    digests = [o.digest for o in tuned.outcomes if o.digest]
    assert digests.count(library.digest) == 1


def test_a_kernel_around_the_library_that_writes_nothing_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tunable = problems()[1]
    (library,) = tunable.pinned
    runner = KernelRunner(tunable.runner.spec)
    runner.prepare(library)
    assert runner.check(library) <= 1
    assert all(1e-7 < seconds < 1e-2 for seconds in runner.time(library, 3))
    monkeypatch.setattr(LaunchedKernel, "launch", lambda *args: None)
    assert runner.check(library) == math.inf


class Told:
    """A tuner to which the library is the fastest for one token and for more than 16."""

    def gemv(self, node: Node) -> None:
        return None

    def gemm(self, node: Node, block_m: int) -> None:
        return None

    def library(self, node: Node, tokens: int) -> bool:
        return tokens in (1, 32)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 32])
def test_guarded_calls_of_the_library_replay_in_a_graph(tokens: int) -> None:
    form = Form(k=256, n=128, norm="weight", halves=True, bias=True, dtype=DType.BF16)
    graph = graph_of(product_of("one", form, tensor("x", form.dtype, B, form.k)))
    program, sources, _ = lower_graph(graph, here(), cutting=Cutting(32, Told()))
    packages = compile_sources(list(sources), here().arch)
    files = {name: content for p in packages for name, content in p.files().items()}
    inputs, weights = drawn(graph, tokens, device="cuda")
    runner = ProgramRunner(program, weights, files.__getitem__, device=torch.device("cuda"))
    runner.run(inputs)
    torch.cuda.synchronize()
    replayed = torch.cuda.CUDAGraph()
    with torch.cuda.graph(replayed, stream=torch.cuda.Stream()):
        (found,) = runner.run(inputs).values()
    others, _ = drawn(graph, tokens, seed=1, device="cuda")
    for name, value in inputs.items():
        value.copy_(others[name])
    replayed.replay()
    torch.cuda.synchronize()
    (wanted,) = truth(graph, inputs, weights)
    error = float((found.double() - wanted).abs().max())
    assert error <= 2 * ERROR[form.dtype] * (1.0 + float(wanted.abs().max()))
    kinds = [call.kind for call in program.at({"B": tokens}).calls]
    assert ("library" in kinds) is (tokens == 1 or tokens > 16)


def test_libraries_of_attention_are_tried_and_torchs_own_choice_is_right() -> None:
    q, k, v = (
        input_node(name, TensorType(DType.BF16, (2, heads, 256, 64)))
        for name, heads in (("q", 8), ("k", 2), ("v", 2))
    )
    node = make("attention", q, k, v, scale=0.125, causal=True)
    tunable = KernelTunable.of(template_named("attention"), node, {}, here())
    with Pool() as pool:
        tuned = tune(tunable, EFFORT, pool)
    states = {o.config["backend"]: o.status for o in tuned.outcomes}
    assert states["auto"] == "ok" and set(states) == {"auto", *ATTENTIONS}
    assert set(states.values()) <= {"ok", "failed", "too_slow"}, states  # not all take all
    assert tuned.choice.seconds is not None


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
