"""Who runs both ways of a decode step, on the CPU: what it compares, on Triton's interpreter. Times
are of GPUs: tests/gpu/test_decode_choice.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from persistent_codes import Coded
from persistent_forms import Model, by_interpreter, together
from tilewright.autotune.tunable import Ready, RunnerSpec
from tilewright.autotune.worker import Limits, Worker
from tilewright.codegen.persistent.reading import read_decode
from tilewright.compiler.decode_choice import StepProblem, config_of
from tilewright.compiler.decode_runner import (
    AMPLIFIED,
    FARTHEST,
    ROUNDING,
    DecodeRunner,
    StepInputs,
    build,
    check_launches,
    drawn_weights,
)
from tilewright.compiler.decode_tunable import DecodeTunable, StepKernels
from tilewright.errors import KernelError
from tilewright.ir.dtypes import DType
from tilewright.targets import Target

CPU = torch.device("cpu")
GRAPH = Model(layers=1).graph()
KERNELS, ONE_LAUNCH = config_of("kernels"), config_of("persistent")
ROUNDED = Coded(DType.F8E4M3, rounds=True).graph(GRAPH)
NIBBLES = Coded(DType.U8, group=32).graph(GRAPH)


def runner_of(graph, folder: Path, batch: int = 2) -> DecodeRunner:
    """As the tuner's worker builds it, of what the parent has written."""
    cpu = Target.parse("cpu")
    problem = StepProblem(graph, read_decode(graph), cpu, batch, (5, 9))
    tunable = DecodeTunable(problem, StepKernels(graph, cpu, batch, 16, None), folder)
    prepared = tunable.prepare([KERNELS, ONE_LAUNCH])
    assert all(isinstance(one, Ready) for one in prepared.values()), prepared
    assert tunable.runner.function.endswith(".decode_runner:build")
    return build(tunable.runner.spec)


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> DecodeRunner:
    found = runner_of(GRAPH, tmp_path_factory.mktemp("step"))
    found.prepare(ONE_LAUNCH)
    return found


def test_both_ways_agree_and_the_kernels_are_what_the_ops_say(runner) -> None:
    assert runner.check(KERNELS) == 0
    assert 0 < runner.check(ONE_LAUNCH) < 0.2
    assert runner.check(ONE_LAUNCH) == runner.check(ONE_LAUNCH)  # over the same caches
    logits, *written = runner.expected
    assert logits.shape == (6, 2, 72)  # three steps in a row at each length
    assert [one.shape for one in written] == [(6, 2, 32), (6, 2, 32)]  # keys, and values
    generator = torch.Generator().manual_seed(1)
    for tensor in runner.caches.values():
        tensor.normal_(generator=generator)
    runner.inputs.place(3)
    tensors = {**runner.weights, **runner.caches}
    wanted = by_interpreter(GRAPH, tensors, runner.inputs.tensors)["logits"].float()
    torch.testing.assert_close(logits[0], wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["o_0", "qkv_0", "norm"])
def test_a_launch_that_computes_something_else_is_wrong(runner, name) -> None:
    good = runner.runners["persistent"]
    other = {**runner.weights, name: torch.zeros_like(runner.weights[name])}
    own, runner.weights = runner.weights, other
    try:
        runner.runners["persistent"] = runner._loaded("persistent")
        assert runner.check(ONE_LAUNCH) > 1
    finally:
        runner.weights, runner.runners["persistent"] = own, good


def test_numbers_that_are_none_are_wrong(runner, monkeypatch) -> None:
    monkeypatch.setattr(runner, "_run", lambda _: torch.full((2, 72), math.nan))
    assert runner.check(ONE_LAUNCH) == math.inf


def test_a_launch_that_was_given_up_is_an_error(runner) -> None:
    (kernel,) = (k for c, k in runner.runners["persistent"].steps if c.kind == "persistent")
    kernel.decode.memory["diagnosis"][:5] = torch.tensor([7, 1, 0, 32, 31])
    with pytest.raises(KernelError, match="7 waits were given up"):
        runner.check(ONE_LAUNCH)
    kernel.decode.reset()
    check_launches(runner.runners["persistent"])


@pytest.mark.parametrize(("graph", "rounds"), [(ROUNDED, True), (NIBBLES, False)])
def test_weights_of_codes_are_drawn_too(graph, rounds, tmp_path) -> None:
    runner = runner_of(graph, tmp_path, batch=1)
    assert runner.tolerances == [ROUNDING] * 3  # of one layer, whose noise is less
    noise = runner._noise(runner.runners["kernels"], runner.weights["embed"])
    assert all((0.01 if rounds else 0.001) < one < ROUNDING / AMPLIFIED for one in noise)
    # What the tolerance was taken from has left nothing behind.
    drawn = drawn_weights(graph, read_decode(graph), CPU)
    assert torch.equal(runner.weights["embed"], drawn["embed"])
    assert runner.check(KERNELS) == 0
    runner.prepare(ONE_LAUNCH)
    assert 0 <= runner.check(ONE_LAUNCH) < 1


def test_tolerances_follow_the_noise_within_bounds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(DecodeRunner, "_noise", lambda *_: [0.2, 0.02, 9.0])
    found = runner_of(ROUNDED, tmp_path, batch=1).tolerances
    assert found == [pytest.approx(0.2 * AMPLIFIED), ROUNDING, FARTHEST]


def test_values_that_are_wrong_are_wrong_where_logits_are_not(runner, monkeypatch) -> None:
    run = runner._run

    def moved(given):
        logits = run(given)
        slots = runner.inputs.tensors["slot_mapping"]
        runner.caches["v_cache_0"].flatten(0, 1)[slots] *= 1.3
        return logits

    monkeypatch.setattr(runner, "_run", moved)
    logits, _keys, values = runner._off(runner._observed(runner.runners["persistent"]))
    assert logits < ROUNDING < values
    assert runner.check(ONE_LAUNCH) > 1


def test_a_launch_with_rounded_activations_that_computes_something_else_is_wrong(tmp_path) -> None:
    runner = runner_of(ROUNDED, tmp_path, batch=1)
    (scale,) = {step.scale for step in read_decode(ROUNDED).calls if step.weight.startswith("o_0")}
    runner.weights = {**runner.weights, scale: torch.zeros_like(runner.weights[scale])}
    runner.prepare(ONE_LAUNCH)
    assert runner.check(ONE_LAUNCH) > 1


def test_a_fresh_process_runs_the_same(runner) -> None:
    spec = {"folder": str(runner.folder), "batch": runner.batch, "lengths": runner.lengths}
    worker = Worker(Limits(start=300.0, load=300.0, check=300.0))
    try:
        worker.open(RunnerSpec("tilewright.compiler.decode_runner:build", spec))
        worker.load(ONE_LAUNCH)
        assert worker.check(ONE_LAUNCH) == runner.check(ONE_LAUNCH)
    finally:
        worker.close()


def test_inputs_are_those_of_steps_over_pages_in_any_order() -> None:
    inputs = StepInputs(3, 9, page=4, vocab=72, device=CPU)
    tables = inputs.tensors["block_tables"]
    assert sorted(tables.flatten().tolist()) == list(range(1, 10))
    inputs.place(6)
    tensors = inputs.tensors
    assert tensors["positions"].tolist() == [5] * 3 and tensors["seq_lens"].tolist() == [6] * 3
    assert tensors["slot_mapping"].tolist() == [int(row[1]) * 4 + 1 for row in tables]
    first = tensors["token_ids"].clone()
    inputs.place(7)
    assert not torch.equal(first, tensors["token_ids"])
    assert len(set(tensors["token_ids"].tolist())) == 3
    assert all(tensors[name].shape == (3,) for name in together([{}]))
    assert tensors["top_p"].tolist() == [1.0] * 3 and tensors["temperature"].tolist() == [0.0] * 3


def test_weights_are_the_same_in_every_process_and_each_of_its_part() -> None:
    shape = read_decode(GRAPH)
    one, other = (drawn_weights(GRAPH, shape, CPU) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert bool((one["norm"] == 1).all()) and one["inv_freq"][0] == 1
    assert 0.015 < float(one["embed"].float().std()) < 0.025
    assert set(one) == {node.attr("name") for node in GRAPH.params}


def test_codes_of_four_bits_are_drawn_around_zero_alike() -> None:
    drawn = drawn_weights(NIBBLES, read_decode(NIBBLES), CPU)
    codes = drawn["gate_up_0.codes"]
    assert codes.dtype == torch.uint8
    nibbles = torch.cat([codes & 15, codes >> 4]).flatten()
    counts = torch.bincount(nibbles, minlength=16)
    assert counts[0] == 0 and bool((counts[1:] > 0.5 * counts.float().mean()).all())
    values = nibbles.double() - 8
    assert abs(float(values.mean())) < 0.2
    scale = float(drawn["gate_up_0.scale"].double().mean())
    assert 0.018 < float(values.std()) * scale < 0.022
