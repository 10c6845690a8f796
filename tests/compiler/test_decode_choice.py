"""Whether decode steps are one launch: what is measured, kept, looked up, rejected and reported.

Times come from a table; kernels are compiled by nobody, but for one test.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

import tilewright as tw
from canned_binaries import canned_binaries
from decode_steps import GRAPH, H100, LENGTH, pool, steps, times
from persistent_forms import Model
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.key import Conditions
from tilewright.autotune.lookup import explain, lookup
from tilewright.autotune.record import Record
from tilewright.autotune.store import Store
from tilewright.autotune.worker import WorkerError
from tilewright.codegen.base import get_backend
from tilewright.codegen.persistent import lowering
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.compiler import decode_choice, decode_tunable, tuning
from tilewright.compiler.decode_choice import choose_steps, config_of, step_problems
from tilewright.compiler.decode_tunable import tune_steps
from tilewright.compiler.inspect.facts import headline
from tilewright.compiler.tuning import problems_of_image, tune_graphs, tuning_store
from tilewright.errors import KernelError, UnsupportedError
from tilewright.ir.parser import parse_graph
from tilewright.targets import TARGETS, Target
from tiny_models import tiny_model
from tuning_records import choice_of

QUICK = EFFORTS["quick"]
KERNELS, ONE_LAUNCH = config_of("kernels"), config_of("persistent")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    with canned_binaries():
        yield tuning_store()


def tuned(store, seconds, faults=None, most=8, effort=QUICK, **options):
    with pool(seconds, faults) as workers, steps(most=most) as found:
        return list(tune_steps(found, effort, store, pool=workers, **options))


def chosen(store, most=8, graph=GRAPH, target=H100):
    kernels = get_backend("triton").lower(graph, target, max_sequences=most)
    return choose_steps(kernels, graph, target, most, LENGTH, store)


def launches(program, batch: int) -> int:
    made = program.at({"B": batch}).calls
    return sum("/persistent/" in call.kernel for call in made)


@pytest.mark.parametrize(
    ("one_launch", "way"),
    [(0.5, ONE_LAUNCH), (0.97, ONE_LAUNCH), (0.995, KERNELS), (1.0, KERNELS), (1.2, KERNELS)],
)
def test_one_launch_is_chosen_where_it_is_surely_faster(store, one_launch, way) -> None:
    (one,) = tuned(store, times(b1=one_launch), most=1)
    record = one.record
    assert (record.config, record.default) == (way, KERNELS)
    assert record.default_seconds == pytest.approx(1.0)
    both = {KERNELS: 1.0, ONE_LAUNCH: one_launch}
    assert record.seconds == pytest.approx(both.pop(way))
    assert dict(record.runners_up) == pytest.approx(both)
    assert Record.from_json(json.loads(record.line)) == record
    assert chosen(store, 1).batches == ((1,) if way == ONE_LAUNCH else ())


def test_each_number_of_sequences_goes_its_own_way(store) -> None:
    tuned(store, times(b1=0.5, b4=0.8, b8=0.999))
    choice = chosen(store)
    assert choice.batches == (1, 4)
    program = choice.lowered.program
    assert [launches(program, batch) for batch in range(1, 10)] == [1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert choice.lowered.notes == ()  # no fallback: strict engines have it too
    facts = choice.facts
    assert facts["way"] == "persistent" and facts["why"].endswith("for steps of 1, 4")
    ways = {batch: (one["way"], one["how"]) for batch, one in facts["steps"].items()}
    assert ways == {
        "1": ("persistent", "measured"),
        "2": ("kernels", "measured"),
        "4": ("persistent", "measured"),
        "8": ("kernels", "measured"),
    }
    assert facts["steps"]["2"]["tried"] == {"kernels": 1.0, "persistent": 2.0}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "wrong: its error is 40 times the tolerance"),
        ("hangs", "hung: loading took"),
        ("given up", "failed: call 3 of 12: 7 waits were given up"),
    ],
)
def test_what_is_wrong_hangs_or_is_given_up_is_rejected_with_the_reason(
    store, fault, reason
) -> None:
    found = tuned(store, times(b1=0.1), {"persistent": fault}, most=2)
    for one in found:
        assert one.record.config == KERNELS
        assert dict(one.record.failed)[ONE_LAUNCH].startswith(reason)
    choice = chosen(store, 2)
    assert choice.batches == ()
    assert choice.facts["steps"]["1"]["tried"]["persistent"].startswith(reason)
    looked = lookup(store, found[0].tunable.key, conditions_here(driver=True))
    assert f"rejected: decode=persistent: {reason}" in explain(looked)


@pytest.mark.parametrize(
    "error",
    [
        UnsupportedError("one launch", expected="rows", found="none", remedy="Leave it."),
        KernelError("one launch", expected="rows", found="none", remedy="Leave it."),
        RuntimeError("a compiler's own"),
    ],
)
def test_what_does_not_compile_is_rejected_and_ends_nothing(store, monkeypatch, error) -> None:
    def fails(*arguments):
        raise error

    monkeypatch.setattr(decode_tunable, "with_one_launch", fails)
    for one in tuned(store, times(b1=0.1, b2=0.1), most=2):
        assert one.record.config == KERNELS
        assert str(error) in dict(one.record.failed)[ONE_LAUNCH]


def test_without_a_worker_nothing_is_recorded_and_the_kernels_stay(store, monkeypatch) -> None:
    def opens(self, spec):
        raise WorkerError("the runner", expected="one", found="no memory", remedy="Free some.")

    monkeypatch.setattr("fake_backends.InProcess.open", opens)
    found = tuned(store, times(b1=0.1), most=2)
    assert [one.record for one in found] == [None, None] and store.records() == ()
    assert all("no memory" in one.tuned.notes[0] for one in found)
    assert chosen(store).batches == ()


def test_what_is_known_is_measured_again_only_where_kernels_were(store) -> None:
    first = tuned(store, times(b1=0.5), most=1)
    again = tuned(store, {}, most=1)  # whoever timed anything would not find it
    assert again[0].tuned is None and again[0].record == first[0].record
    (anew,) = tuned(store, times(b1=1.5), most=1, again=True)
    assert anew.record.config == KERNELS and chosen(store, 1).batches == ()


def test_what_is_not_reached_keeps_its_kernels(store) -> None:
    found = tuned(store, times(b1=0.5), deadline=time.monotonic() - 1)
    assert [one.reached for one in found] == [False] * 4 and store.records() == ()
    for effort in (EFFORTS["cached"], QUICK.limited(trials=0), QUICK.limited(trials=1)):
        assert tuned(store, times(b1=0.5), effort=effort)[0].record is None
    assert tuned(store, times(b1=0.5), effort=QUICK.limited(trials=2))[0].record.trials == 2


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("template", {"template": "decode"}),
        ("template_hash", {"template_hash": "0" * 64}),
        ("space_hash", {"space_hash": "0" * 64}),
        ("device", {"device": "h200"}),
        ("arch", {"arch": 100}),
        *((f"problem.{name}", {}) for name, _ in step_problems(GRAPH, H100, 1, 64)[0].key.problem),
    ],
)
def test_a_record_of_another_key_is_none(store, field, changes) -> None:
    key = step_problems(GRAPH, H100, 1, LENGTH)[0].key
    with steps(most=1) as (step,):
        record = choice_of(step, ONE_LAUNCH, conditions=conditions_here(driver=True))
    if field.startswith("problem."):
        name = field.partition(".")[2]
        facts = {**dict(key.problem)}
        facts[name] = 7 if isinstance(facts[name], int) else "another"
        changes = {"problem": tuple(facts.items())}
    store.add(replace(record, key=replace(key, **changes)))
    choice = chosen(store, 1)
    assert choice.batches == ()
    why = choice.facts["steps"]["1"]["why"]
    assert why == "nothing was measured" if field == "template" else field in why
    store.add(record)
    assert chosen(store, 1).batches == (1,)


def test_the_key_changes_with_the_kernel_and_the_step(monkeypatch) -> None:
    def key(graph=GRAPH, batch=1, length=LENGTH):
        return next(p.key for p in step_problems(graph, H100, 8, length) if p.batch == batch)

    known = key()
    assert key() == known
    assert known.differences(key(batch=2)) == ("template_hash", "problem.sequences")
    assert known.differences(key(length=8192)) == ("problem.context", "problem.longest")
    other = Model(layers=1, ffn=128).graph()
    assert {"problem.calls", "problem.weight_bytes"} <= {*known.differences(key(other))}
    deeper = {"problem.calls", "problem.layers", "problem.weight_bytes", "template_hash"}
    assert {*known.differences(key(Model(layers=2).graph()))} == deeper
    renamed = parse_graph(str(GRAPH).replace('"qkv_0"', '"another"').replace('"o_0"', '"one"'))
    assert key(renamed) == known  # whatever its weights are called
    with monkeypatch.context() as patch:
        tiling = replace(
            lowering.tiling_for(H100, step_problems(GRAPH, H100, 1, 8)[0].shape), rows=2
        )
        patch.setattr(lowering, "tiling_for", lambda *_: tiling)
        assert known.differences(key()) == ("template_hash",)


WIDE = Model(1024, layers=1, heads=16, kv_heads=8, dim=64, ffn=2048, vocab=2048, page=16).graph()


@pytest.mark.parametrize("graph", [GRAPH, WIDE])
def test_the_kernel_of_the_key_is_the_one_that_is_made(graph) -> None:
    kernels = get_backend("triton").lower(graph, H100)
    for problem in step_problems(graph, H100, 4, LENGTH):
        made = lowering.with_one_launch(kernels, graph, H100, [problem.batch]).program
        (call,) = (call for call in made.calls if "/persistent/" in call.kernel)
        digest = lowering.launch_digest(problem.shape, H100, problem.batch)
        assert digest.startswith(call.kernel.rpartition("-")[2])


def test_steps_are_those_that_steps_are_padded_to_on_devices_that_are_worth_it() -> None:
    def batches(most):
        return [one.batch for one in step_problems(GRAPH, H100, most, LENGTH)]

    assert [batches(most) for most in (1, 2, 3, 5, 64)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [1, 2, 4, 8],
        [1, 2, 4, 8],
    ]
    assert batches(None) == [1, 2, 4, 8]
    limits = (1, 100, 512, 1024, 4096, 8192, 100000, None)
    lengths = [step_problems(GRAPH, H100, 1, limit)[0].lengths for limit in limits]
    both = (512, 4096)
    assert lengths == [(1,), (64,), (256,), (512,), (512,), both, both, both]
    for name in ("a100", "l4", "cpu"):
        with pytest.raises(UnsupportedError, match="sm_90 or later"):
            step_problems(GRAPH, Target.parse(name), 1, LENGTH)


def test_a_record_of_other_conditions_is_taken_with_a_note(store) -> None:
    with steps(most=1) as (step,):
        here = conditions_here(driver=True)
        other = replace(here, version="0")
        store.add(choice_of(step, ONE_LAUNCH, conditions=other))
    choice = chosen(store, 1)
    assert choice.batches == (1,)
    one = choice.facts["steps"]["1"]
    assert one["how"] == "stale" and "another version: tune again" in one["why"]


def test_a_record_of_another_triton_is_not_taken(store) -> None:
    with steps(most=1) as (step,):
        store.add(choice_of(step, ONE_LAUNCH, conditions=Conditions("1.0", None, "0")))
    choice = chosen(store, 1)
    assert choice.batches == ()
    one = choice.facts["steps"]["1"]
    assert (one["way"], one["how"]) == ("kernels", "default")
    assert "another triton, version: tune again" in one["why"]


def test_one_that_does_not_compile_any_more_is_separate_kernels(store, monkeypatch) -> None:
    tuned(store, times(b1=0.5, b2=0.5, b4=0.5), most=4)
    make = decode_choice.with_one_launch

    def fails(lowered, graph, target, batches):
        if 2 in batches:
            raise UnsupportedError("two", expected="one", found="2", remedy="Leave it.")
        return make(lowered, graph, target, batches)

    monkeypatch.setattr(decode_choice, "with_one_launch", fails)
    choice = chosen(store, 4)
    assert choice.batches == (1, 4)
    two = choice.facts["steps"]["2"]
    assert two["way"] == "kernels" and "cannot be had: two" in two["why"]
    monkeypatch.setattr(decode_choice, "BATCHES", (1, 2))
    monkeypatch.setattr(decode_choice, "with_one_launch", lambda *_: fails(None, None, None, [2]))
    assert chosen(store, 4).batches == ()


def test_launches_that_only_fail_together_are_all_left_out(store, monkeypatch) -> None:
    tuned(store, times(b1=0.5, b2=0.5), most=2)
    make, tried = decode_choice.with_one_launch, []

    def fails(lowered, graph, target, batches):
        tried.append(tuple(batches))
        if len(batches) > 1:
            raise UnsupportedError("both", expected="one", found="2", remedy="Leave it.")
        return make(lowered, graph, target, batches)

    monkeypatch.setattr(decode_choice, "with_one_launch", fails)
    choice = chosen(store, 2)
    assert choice.batches == () and tried == [(1, 2), (1,), (2,)]
    assert "cannot be had: both" in choice.facts["steps"]["1"]["why"]


def test_another_triton_is_separate_kernels(store, monkeypatch) -> None:
    def launch_digest(*_):
        raise ImportError("no hopper here")

    monkeypatch.setattr(decode_choice, "launch_digest", launch_digest)
    choice = chosen(store, 1)
    assert choice.batches == () and choice.facts["why"] == "no hopper here"


def compiled(target="h100", **options):
    model = tiny_model("llama").to(torch.bfloat16)
    given = {"max_batch_size": 2, "max_model_len": LENGTH, "verify": "off", "backend": "triton"}
    return tw.compile(model, target=target, **{**given, **options})


def test_an_engine_has_one_launch_where_a_record_says_so(store) -> None:
    plain = compiled()
    program = plain.image.decode.program
    assert launches(program, 1) == launches(program, 2) == 0
    assert plain.report()["decode"]["steps"]["1"]["why"] == "nothing was measured"
    graph = parse_graph(plain.image.decode.graphs[-1][1])
    with steps(graph, 2) as found:
        store.add(choice_of(found[0], ONE_LAUNCH, conditions=conditions_here(driver=True)))
    engine = compiled(strict=True)
    program = engine.image.decode.program
    assert (launches(program, 1), launches(program, 2)) == (1, 0)
    assert engine.report()["decode"]["steps"]["1"]["way"] == "persistent"
    assert "measured to be faster for steps of 1" in dict(headline(engine.image))["decode steps"]
    assert len(problems_of_image(engine.image)) == len(problems_of_image(plain.image))
    for options in ({"decode": "kernels"}, {"tune": "none"}, {"target": "h200"}):
        other = compiled(**options)
        assert launches(other.image.decode.program, 1) == 0, options
        assert other.report()["decode"]["way"] == "kernels"
    assert "asked for" in compiled(decode="persistent").report()["decode"]["why"]


def test_graphs_that_it_does_not_know_and_other_devices_have_kernels(store) -> None:
    engine = compiled(quantize="int8-weight")
    said = engine.report()["decode"]
    assert said["way"] == "kernels" and "one launch for all layers: " in said["why"]
    assert engine.report()["fallbacks"] == compiled(decode="kernels").report()["fallbacks"]
    assert compiled(deterministic=True).report()["decode"] is None
    assert compiled(target="cpu", backend="eager").report()["decode"] is None
    assert "sm_90" in compiled(target="a100").report()["decode"]["why"]


def test_a_measuring_compile_measures_steps_behind_kernels(store, monkeypatch) -> None:
    order = []

    def kernels(problems, *arguments, **options):
        order.append(("kernels", len(problems)))
        return ()

    def ways(found, effort, store, **options):
        order.append(([one.problem.batch for one in found], options["again"]))
        return ()

    monkeypatch.setattr(tuning, "tune_all", kernels)
    monkeypatch.setattr(decode_tunable, "tune_steps", ways)
    of = compiled().image
    graph, general = (parse_graph(graphs[-1][1]) for graphs in (of.decode.graphs, of.graphs))
    for decode in ("auto", "kernels"):
        options = type("Options", (), {"tune": "quick", "target": TARGETS["h100"]})
        options.max_batch_size, options.decode = 2, decode
        tune_graphs(graph, general, options, LENGTH)
    assert [one[0] for one in order] == ["kernels", [1, 2], "kernels"]
    assert order[1][1] is False
