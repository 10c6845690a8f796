"""What is timed: steps that a runner takes, each distinct call of them, and its counterpart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright as tw
from house.tree import ROOT
from tilewright.codegen.program import Call
from tilewright.compiler.bench.decoding import decode_runner
from tilewright.compiler.inspect.kernels import VIEWS
from tilewright.compiler.regress.timing.package import Package
from tilewright.compiler.regress.timing.problems import (
    Kernels,
    Problem,
    record_problems,
    subject_of,
)
from tilewright.compiler.regress.timing.steps import (
    SETTINGS,
    StepSetting,
    fits,
    make_step,
    pages_of,
)
from tilewright.compiler.regress.timing.units import _difference
from tilewright.ir.dims import evaluate
from tilewright.runtime.image import LMConfig
from tiny_gguf import tiny_hf_model

DECODE = StepSetting("decode b2", 2, 1, 20)
PREFILL = StepSetting("prefill 33", 1, 33, 33)

settings = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 70)).map(
    lambda t: StepSetting("any", t[0], t[1], t[1] + t[2])
)


@pytest.mark.quick
@given(settings, st.sampled_from([1, 3, 8, 16, 64]), st.integers(0, 3))
def test_a_step_is_one_that_a_scheduler_could_have_made(setting, page, seed):
    lm = LMConfig(50, 128, 9, page, "paged", ())
    step = make_step(setting, lm, seed)
    count, new, context = setting.sequences, setting.tokens, setting.context
    pages = pages_of(setting, page)
    assert (pages - 1) * page < context <= pages * page
    assert step.block_tables.shape == (count, pages)
    tables = step.block_tables.flatten().tolist()
    assert sorted(tables) == list(range(1, count * pages + 1))  # each once, never page 0
    assert step.query_start.tolist() == [new * i for i in range(count + 1)]
    assert step.seq_lens.tolist() == [context] * count
    assert step.logits_indices.tolist() == [new * (i + 1) - 1 for i in range(count)]
    wanted_positions, wanted_slots = [], []
    for sequence in range(count):
        for position in range(context - new, context):
            wanted_positions.append(position)
            table = step.block_tables[sequence].tolist()
            wanted_slots.append(table[position // page] * page + position % page)
    assert step.positions.tolist() == wanted_positions
    assert step.slot_mapping.tolist() == wanted_slots
    assert len(set(wanted_slots)) == len(wanted_slots) == len(step.token_ids)
    assert 0 <= int(step.token_ids.min()) <= int(step.token_ids.max()) < 50
    kinds = [t.dtype for t in (step.block_tables, step.seq_lens, step.query_start)]
    assert kinds == [torch.int32] * 3
    assert all(getattr(step, name).is_contiguous() for name in step.__slots__)


def test_a_step_depends_on_its_seed_alone():
    lm = LMConfig(50, 1024, 32, 16, "paged", ())
    one, two, other = (make_step(SETTINGS[1], lm, seed) for seed in (0, 0, 1))
    assert all(torch.equal(getattr(one, n), getattr(two, n)) for n in one.__slots__)
    assert not torch.equal(one.block_tables, other.block_tables)


@pytest.mark.parametrize(("length", "batch", "fitting"), [(512, 32, 3), (511, 32, 0), (512, 31, 2)])
def test_settings_that_an_engine_does_not_take(length, batch, fitting):
    lm = LMConfig(50, length, batch, 16, "paged", ())
    assert sum(fits(setting, lm) for setting in SETTINGS) == fitting


@pytest.fixture(scope="module")
def model():
    return tiny_hf_model("llama")


@pytest.fixture(scope="module")
def engines(model):
    """An engine a backend: of the same model, for the CPU."""
    made = {}

    def engine(backend="eager"):
        if backend not in made:
            options = {"target": "cpu", "max_model_len": 64, "max_batch_size": 4}
            made[backend] = tw.compile(model, backend=backend, verify="off", **options)
        return made[backend]

    return engine


@pytest.fixture(scope="module")
def interpreted(engines):
    """The problems of a step by the kernels' own code."""
    return record_problems(engines("triton"), StepSetting("prefill 4", 1, 4, 4))


@pytest.fixture(scope="module")
def decoded(engines):
    """The problems of a decode step, by the Program that runs it."""
    engine = engines("triton")
    return record_problems(engine, StepSetting("decode b1", 1, 1, 4), decode_runner(engine))


def tokens(engine):
    params = tw.SamplingParams(max_new_tokens=6, ignore_eos=True)
    return [one.token_ids for one in engine.generate([[3, 5, 7], list(range(20))], params)]


@pytest.mark.parametrize("setting", [DECODE, PREFILL])
def test_each_distinct_call_is_kept_once_on_operands_of_the_setting(engines, setting):
    engine = engines()
    found = record_problems(engine, setting)
    count, new = setting.sequences, setting.tokens
    pages = pages_of(setting, engine.image.lm.page_size)
    sizes = {"T": count * new, "B": count, "R": count, "M": pages, "N": 1 + count * pages, "P": 16}
    assert all(problem.sizes == sizes for problem in found)
    keys = [
        (p.call.kernel, tuple(None if x is None else (x.shape, x.stride()) for x in p.operands))
        for p in found
    ]
    assert len(set(keys)) == len(keys)
    ran = {c.kernel for c in engine.image.program.calls if c.kernel.split("/")[1] not in VIEWS}
    assert {problem.call.kernel for problem in found} == ran
    for problem in found:
        buffers = engine.image.program.buffers
        for name, operand in zip(problem.call.operands, problem.operands, strict=True):
            if name is not None:
                shape = [evaluate(size, sizes) for size in buffers[name].shape]
                assert list(operand.shape) == shape, problem.subject
                assert operand.dtype is buffers[name].dtype.torch
        again = problem.kernel(problem.operands, problem.sizes)
        assert all(torch.isfinite(x).all() for x in again if x.is_floating_point())


def test_subjects_are_numbered_in_the_order_of_their_calls(engines, interpreted):
    for problems in (record_problems(engines(), DECODE), interpreted):
        subjects = [problem.subject for problem in problems]
        assert len(set(subjects)) == len(subjects)
        seen: Counter[str] = Counter()
        for problem in problems:
            name = subject_of(problem.call)
            seen[name] += 1
            assert problem.subject == (name if seen[name] == 1 else f"{name}#{seen[name]}")
    assert {"linear", "linear#2", "paged_attention", "rope_append_kv"} <= set(subjects)
    assert not any(part in name for name in subjects for part in ("/", "-"))


def test_the_engine_is_as_it_was(engines, monkeypatch):
    engine = engines()
    before, steps = tokens(engine), engine.runner.steps
    record_problems(engine, DECODE)
    assert engine.runner.steps is steps
    assert tokens(engine) == before

    def broken(operands, sizes):
        raise RuntimeError("no kernel")

    bad = [*steps[:-1], (steps[-1][0], broken)]
    monkeypatch.setattr(engine.runner, "steps", bad)
    with pytest.raises(RuntimeError, match="no kernel"):
        record_problems(engine, DECODE)
    assert engine.runner.steps is bad
    monkeypatch.undo()
    assert tokens(engine) == before


@pytest.fixture
def chosen(monkeypatch):
    """Which call each problem gets, in place of its kernel."""
    monkeypatch.setattr(Kernels, "load", lambda self, call, device: call)

    def of(kernels, problem):
        load = kernels.of(problem)
        return load if isinstance(load, str) else load()

    return of


@pytest.fixture(scope="module")
def kernels(engines):
    return lambda image: Kernels(image, Package(ROOT, "tilewright"))


def test_a_second_compile_has_the_same_call_for_each_problem(
    model, engines, interpreted, kernels, chosen
):
    options = {"target": "cpu", "max_model_len": 64, "max_batch_size": 4}
    second = tw.compile(model, backend="triton", verify="off", **options)
    first, again = engines("triton").image.program, kernels(second.image)
    for problem in interpreted:
        call = chosen(again, problem)
        assert call is not problem.call and call.kernel == problem.call.kernel
        old, new = (
            [None if name is None else str(program.buffers[name]) for name in operands]
            for program, operands in (
                (second.image.program, call.operands),
                (first, problem.call.operands),
            )
        )
        assert old == new, problem.subject


def test_a_counterpart_computes_the_same(engines, kernels):
    engine = engines()
    for problem in record_problems(engine, DECODE):
        load = kernels(engine.image).of(problem)
        assert callable(load), load
        ours = problem.kernel(problem.operands, problem.sizes)
        for a, b in zip(ours, load()(problem.operands, problem.sizes), strict=True):
            torch.testing.assert_close(a, b)


def test_decode_steps_are_timed_by_the_program_that_runs_them(engines, decoded, kernels, chosen):
    image = engines("triton").image
    assert image.decode is not None
    program = image.decode.program
    # Sequences that are timed share no pages, so that cascade attention has nothing to do.
    asked = {call.kernel for call in program.calls if "/cascade-" not in call.kernel}
    assert {p.call.kernel for p in decoded} == asked
    subjects = {problem.subject for problem in decoded}
    assert {"paged_decode", "rms_norm_linear", "rms_norm_linear_gated", "linear_add"} <= subjects
    own = kernels(image)
    for problem in decoded:
        call = chosen(own, problem)
        assert any(call is one for one in program.calls), problem.subject
        assert own._program(call) is program
        assert call.kernel == problem.call.kernel


def test_without_a_decode_program_kernels_of_the_general_one_are_counterparts(
    engines, decoded, kernels, chosen
):
    image = engines("triton").image
    older = kernels(replace(image, decode=None))
    for problem in decoded:
        call = chosen(older, problem)
        if "linear" in problem.subject or problem.subject in ("paged_decode", "sample"):
            assert isinstance(call, str), problem.subject
        elif not isinstance(call, str):
            assert any(call is one for one in image.program.calls), problem.subject
    appends = next(p for p in decoded if p.subject == "rope_append_kv")
    assert not isinstance(chosen(older, appends), str)


def test_other_operands_have_no_counterpart(engines, interpreted, kernels, chosen):
    own = kernels(engines("triton").image)
    linear = next(p for p in interpreted if p.subject == "linear")
    x, weight, bias = linear.operands
    for operands in (
        (x.double(), weight, bias),
        (x[None], weight, bias),
        (x, weight[:-8], bias),  # else another of its name would be loaded, and run out of bounds
        (x, weight, weight[:, 0]),
        (x, weight),
    ):
        said = chosen(own, replace(linear, operands=operands))
        assert isinstance(said, str) and "no such kernel on operands of these types" in said
    with_constants = replace(linear, call=replace(linear.call, constants=("w",)))
    assert isinstance(chosen(own, with_constants), str)
    assert isinstance(chosen(own, replace(linear, subject="conv")), str)
    more = torch.zeros(7, 64)  # a size that only a run knows may be any
    assert not isinstance(chosen(own, replace(linear, operands=(more, weight, bias))), str)


def test_of_several_alike_the_same_text_goes_before_the_number(
    engines, interpreted, kernels, chosen
):
    own = kernels(engines("triton").image)
    add = next(p for p in interpreted if p.subject == "add_rms_norm")
    other = replace(add.call, kernel="triton/generated/add_rms_norm_0000-00000000")
    own.calls[0] = [other, *own.calls[0]]
    assert chosen(own, add).kernel == add.call.kernel
    changed = replace(add, call=replace(add.call, kernel="triton/generated/add_rms_norm_1-1"))
    assert chosen(own, changed) is other
    assert chosen(own, replace(changed, subject="add_rms_norm#2")).kernel == add.call.kernel
    assert chosen(own, replace(changed, subject="add_rms_norm#9")) is not None


@pytest.mark.quick
def test_what_a_kernel_hands_on_to_others_is_no_difference():
    """With one token nobody writes it, and each side's memory holds something else."""
    call = Call("triton/template/x", ("a",), ("h", "h.scaled", "h.squares"))
    own, other = torch.ones(1, 4), torch.full((1, 4), 1.5)

    def kernel(h):
        return lambda operands, sizes: [h, torch.randn(1, 4), torch.randn(1, 1)]

    problem = Problem("x", "decode b1", call, (own,), {"B": 1}, kernel(own))
    assert _difference(problem, kernel(own.clone())) == 0.0
    assert _difference(problem, kernel(other)) == pytest.approx(1 / 3)
    plain = replace(problem, call=replace(call, results=("h", "h.0", "h.1")))
    assert _difference(plain, kernel(own.clone())) > 0.0
