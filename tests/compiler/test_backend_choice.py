"""Which backend a model gets: what is measured, kept, looked up, refused and survived.

Times come from a table; the engines are files with a name in them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fake_backends import LIMIT, TEXT, FakeRivals, graph, options, pool
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.key import Conditions
from tilewright.autotune.pool import Pool
from tilewright.autotune.store import Store
from tilewright.autotune.worker import WorkerError
from tilewright.compiler import backend_choice, backend_tunable, tuning
from tilewright.compiler.backend_choice import choose_backend, tunable_of, tune_backend
from tilewright.compiler.backend_runner import Work
from tilewright.compiler.backend_tunable import BackendTunable, backend_of, key_of
from tilewright.compiler.options import KVCacheConfig
from tilewright.compiler.tuning import CUT_SHORT, tuning_store
from tilewright.errors import UnsupportedError, UsageError
from tilewright.ir.parser import parse_graph
from tilewright.passes.heads import GQA
from tuning_records import choice_of

QUICK = EFFORTS["quick"]
FASTER = {"onnxruntime": 1.0, "eager": 0.5}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(backend_tunable, "save_engine", lambda image, path, how: path.mkdir())


def tuned(made: FakeRivals, seconds, faults=None, effort=QUICK, **options):
    store = Store(options.pop("path", tuning_store().path))
    with pool(seconds, faults) as workers, tunable_of(made.rivals()) as tunable:
        return tune_backend(tunable, effort, store, pool=workers, **options)


def statuses(one) -> dict[str, str]:
    return {backend_of(o.config): o.status for o in one.tuned.outcomes}


def test_a_reference_that_does_not_run_leaves_the_default(monkeypatch) -> None:
    def opens(self, spec):
        raise WorkerError("the runner", expected="one", found="no memory", remedy="Free some.")

    monkeypatch.setattr("fake_backends.InProcess.open", opens)
    monkeypatch.setattr(backend_choice, "Pool", lambda limits: pool(FASTER))
    wanted, made = options(tune="quick"), FakeRivals()
    choice = choose_backend(made.rivals(wanted), wanted)
    assert choice.facts["how"] == "default" and "no memory" in choice.facts["why"]
    assert choice.image.backend == "onnxruntime" and tuning_store().records() == ()


@pytest.mark.parametrize(
    ("eager", "chosen"),
    [(0.5, "eager"), (0.9, "eager"), (0.99, "onnxruntime"), (1.5, "onnxruntime")],
)
def test_the_default_stays_unless_another_is_surely_faster(eager, chosen) -> None:
    one = tuned(FakeRivals(), {"onnxruntime": 1.0, "eager": eager})
    assert backend_of(one.record.config) == chosen
    assert one.gain == pytest.approx(max(1.0, 1.0 / eager if chosen == "eager" else 1.0))
    assert dict(one.record.key.problem)["work"].endswith("1/2 alone + 1/2 one of 2 at once")
    assert (statuses(one)["triton"], statuses(one)["onnxruntime"]) == ("refused", "ok")


def test_what_was_measured_is_taken_by_a_later_compile_and_not_measured_again() -> None:
    made = FakeRivals()
    tuned(made, FASTER)
    again = tuned(made, {})  # whoever timed anything would not find it
    assert again.tuned is None and backend_of(again.record.config) == "eager"
    later = FakeRivals()
    choice = choose_backend(later.rivals(), options(tune="cached"))
    assert choice.facts["name"] == choice.image.backend == "eager"
    assert (choice.facts["how"], choice.facts["gain"]) == ("measured", pytest.approx(2.0))
    assert choice.facts["tried"]["onnxruntime"] == 1.0 and later.made == ["eager"]


def test_a_measuring_compile_returns_the_engine_that_won(monkeypatch) -> None:
    monkeypatch.setattr(backend_choice, "Pool", lambda limits: pool(FASTER))
    made, wanted = FakeRivals(), options(tune="quick")
    choice = choose_backend(made.rivals(wanted), wanted)
    assert choice.image.backend == choice.facts["name"] == "eager"
    assert sorted(made.made) == ["eager", "onnxruntime"]  # each once, the reference is one of them
    assert choice.facts["how"] == "measured" and "surely faster" in choice.facts["why"]
    assert choose_backend(made.rivals(wanted), wanted).facts["how"] == "measured"  # from the store
    assert not list(tuning_store().path.parent.glob("rivals-*"))


@pytest.mark.parametrize("changes", [{"tune": "none"}, {"backend": "eager"}])
def test_who_leaves_no_choice_gets_none(changes) -> None:
    tuned(FakeRivals(), FASTER)
    wanted, made = options(**changes), FakeRivals()
    rivals = made.rivals(wanted) if wanted.rivals else None
    choice = choose_backend(rivals, wanted)
    assert (choice.image, made.made, choice.facts["name"]) == (None, [], wanted.backend)
    assert choice.facts["how"] == ("default" if rivals else "named")


def test_a_deterministic_model_has_no_rivals() -> None:
    wanted = options(target="h100", deterministic=True)
    assert wanted.rivals == () and options(target="h100").rivals != ()
    assert "deterministic" in choose_backend(None, wanted).facts["why"]
    with pytest.raises(UnsupportedError, match="not deterministic"):
        options(target="cpu", backend="triton", deterministic=True, tune="quick")


def test_rivals_are_those_of_the_registry_with_the_same_options_or_a_reason() -> None:
    found = {one.backend: one for one in options(target="h100").rivals}
    assert found["eager"].options.cache == "paged" and "CUDA" in found["onnxruntime"].refused
    found = {one.backend: one for one in options(kv_cache="static").rivals}
    assert found["eager"].options.cache == "slot" and "for GPUs" in found["triton"].refused
    kept = KVCacheConfig("auto", dtype="fp8")
    found = {one.backend: one for one in options(target="h100", kv_cache=kept).rivals}
    assert found["eager"].options.codes is not None


def test_measuring_needs_the_device_or_a_choice() -> None:
    assert options(tune="quick").tune == "quick"
    for wrong in ({"target": "h100"}, {"backend": "eager"}, {"backend": "onnxruntime"}):
        with pytest.raises(UnsupportedError, match="backend='auto'"):
            options(tune="quick", **wrong)


def test_what_computes_something_else_or_does_not_compile_is_refused() -> None:
    one = tuned(FakeRivals(), FASTER, {"eager": "wrong"})
    assert statuses(one)["eager"] == "wrong" and backend_of(one.record.config) == "onnxruntime"
    assert (
        "40 times the tolerance" in dict((backend_of(c), r) for c, r in one.record.failed)["eager"]
    )
    error = UnsupportedError("op sort", expected="a form", found="none", remedy="Leave it.")
    for fault in (error, ImportError("no such library"), RuntimeError("a bug")):
        one = tuned(FakeRivals({"onnxruntime": fault}), FASTER, again=True)
        failed = {backend_of(c): reason for c, reason in one.record.failed}
        assert str(fault)[:10] in failed["onnxruntime"]
        assert backend_of(one.record.config) == "eager"


def test_without_a_reference_nothing_is_measured_and_the_default_stays() -> None:
    one = tuned(FakeRivals({"eager": RuntimeError("a bug")}), FASTER)
    assert one.record is None and set(statuses(one).values()) == {"refused"}
    assert "nothing to hold it against" in one.tuned.outcomes[0].reason


def test_a_process_that_dies_of_one_is_survived(monkeypatch) -> None:
    monkeypatch.setattr(backend_tunable, "_RUNNER", "fake_backend_runner:FakeRunner")
    spec, real = {"seconds": FASTER, "faults": {"eager": "crash"}}, backend_tunable.RunnerSpec
    monkeypatch.setattr(backend_tunable, "RunnerSpec", lambda name, _: real(name, spec))
    with Pool() as workers, tunable_of(FakeRivals().rivals()) as tunable:
        one = tune_backend(tunable, QUICK, tuning_store(), pool=workers)
    assert statuses(one)["eager"] == "crashed"
    assert backend_of(one.record.config) == "onnxruntime"


def test_ctrl_c_keeps_what_was_found_and_the_next_run_measures_again(monkeypatch) -> None:
    interrupted = pool(FASTER, {"eager": "ctrl_c"})
    monkeypatch.setattr(backend_choice, "Pool", lambda limits: interrupted)
    wanted = options(tune="quick")
    with pytest.raises(KeyboardInterrupt):
        choose_backend(FakeRivals().rivals(wanted), wanted)
    (record,) = tuning_store().records()
    assert record.budget == f"quick{CUT_SHORT}" and backend_of(record.config) == "onnxruntime"
    assert not list(tuning_store().path.parent.glob("rivals-*"))
    one = tuned(FakeRivals(), FASTER)
    assert one.tuned is not None and backend_of(one.record.config) == "eager"


def test_a_deadline_cuts_short_and_zero_measures_nothing() -> None:
    one = tuned(FakeRivals(), FASTER, deadline=time.monotonic() - 1)
    assert one.record is None and "out of time" in one.tuned.notes[0]
    one = tuned(FakeRivals(), FASTER, effort=QUICK.limited(trials=0))
    assert one.record is None and "nothing was measured" in one.tuned.notes[0]


def test_a_record_of_other_versions_is_taken_with_a_note(monkeypatch) -> None:
    tuned(FakeRivals(), FASTER)
    monkeypatch.setattr(backend_choice, "library_versions", lambda: "onnxruntime 99")
    choice = choose_backend(FakeRivals().rivals(), options())
    assert (choice.facts["name"], choice.facts["how"]) == ("eager", "stale")
    assert "libraries" in choice.facts["why"]
    assert tuned(FakeRivals(), FASTER).tuned is not None  # and is measured anew


def test_what_was_faster_but_cannot_be_had_leaves_the_default() -> None:
    tuned(FakeRivals(), FASTER)
    gone = FakeRivals({"eager": ImportError("gone")})
    choice = choose_backend(gone.rivals(), options())
    assert (choice.image, choice.facts["name"]) == (None, "onnxruntime")
    assert "gone" in choice.facts["why"]
    rivals = FakeRivals().rivals()
    rivals = replace(rivals, options={"onnxruntime": options()}, refused={"eager": "not here"})
    assert "not here" in choose_backend(rivals, options()).facts["why"]


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_compiled(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "file"))
    made, wanted = FakeRivals(), options(tune="quick")
    with pytest.raises(UsageError, match="TILEWRIGHT_CACHE"):
        choose_backend(made.rivals(wanted), wanted)
    assert made.made == []


def tunable_with(key) -> BackendTunable:
    return BackendTunable(replace(FakeRivals().rivals(), key=key), Path())


KEY = {"graph": graph(), "options": options(), "limit": LIMIT, "work": Work.of(LIMIT, 2)}
OTHER_TEXT = TEXT.replace("[8, 4]", "[9, 4]").replace("S, 8]", "S, 9]")
WINDOW = KVCacheConfig(window=32)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"graph": parse_graph(OTHER_TEXT).with_weights(graph().weights)}, "problem.graph"),
        ({"options": options(quantize="int8-weight")}, "problem.quantize"),
        ({"options": options(quantize="expanded")}, "problem.stored"),
        ({"options": options(attention=GQA(1))}, "problem.heads"),
        ({"options": options(max_batch_size=3)}, "problem.max_batch_size"),
        ({"limit": 32}, "problem.max_model_len"),
        ({"options": options(kv_cache="static")}, "problem.kv_cache"),
        ({"options": options(kv_cache=KVCacheConfig(page_size=32))}, "problem.kv_cache"),
        ({"options": options(kv_cache=KVCacheConfig(prefix_caching=False))}, "problem.kv_cache"),
        ({"options": options(target="h100", kv_cache=WINDOW)}, "problem.kv_cache"),
        (
            {"options": options(target="h100", kv_cache=KVCacheConfig(dtype="int8"))},
            "problem.kv_cache",
        ),
        ({"work": Work(64, 8, 2)}, "problem.work"),
        ({"options": options(target="h100")}, "device"),
        ({"options": options(target="h100")}, "arch"),
    ],
)
def test_another_field_is_another_key_and_a_miss_names_it(changed, field) -> None:
    asked, other = key_of(**KEY), key_of(**{**KEY, **changed})
    assert asked == key_of(**KEY)
    assert field in asked.differences(other)
    tuning_store().add(choice_of(tunable_with(other)))
    assert field in choose_backend(FakeRivals().rivals(), options()).facts["why"]


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("cpu_name", lambda: "another", "problem.processor"),
        ("cpu_isa_flags", lambda: ("avx9",), "problem.processor"),
        ("available_cores", lambda: 77, "problem.cores"),
        ("_stored", lambda graph: "Q4_1:3", "problem.weights"),
        (
            "SPACE",
            backend_tunable.Space((backend_tunable.Choice("backend", ("x",)),)),
            "space_hash",
        ),
        ("_runner_hash", lambda: "0", "template_hash"),
    ],
)
def test_another_machine_checkpoint_or_code_is_another_key(monkeypatch, name, value, field) -> None:
    before = key_of(**KEY)
    monkeypatch.setattr(backend_tunable, name, value)
    assert before.differences(key_of(**KEY)) == (field,)


def test_the_threads_that_backends_may_use_are_their_cores(monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_THREADS", "63")
    assert dict(key_of(**KEY).problem)["cores"] == 63


def test_a_graph_is_the_same_whatever_it_is_called() -> None:
    other = replace(graph(), name="another")
    assert key_of(**KEY) == key_of(**{**KEY, "graph": other})


@pytest.mark.quick
def test_conditions_name_the_libraries_and_old_records_have_none() -> None:
    here = Conditions("3.6", "13.0", "0.1", "torch 2")
    assert Conditions.from_json(here.to_json()) == here
    assert here.differences(replace(here, libraries="torch 3")) == ("libraries",)
    old = {"triton": "3.6", "driver": "13.0", "version": "0.1"}
    assert Conditions.from_json(old).to_json() == old
    assert f"torch {torch.__version__.split('+')[0]}" in backend_choice.library_versions()


@pytest.mark.quick
@pytest.mark.parametrize(("limit", "batch"), [(2, 1), (8, 3), (64, 8), (8192, 32)])
def test_the_work_fits_the_context(limit, batch) -> None:
    work = Work.of(limit, batch)
    assert work.prompt >= 1 and work.new_tokens >= 1
    assert work.prompt + work.new_tokens <= limit and work.batch == batch
    assert work.seconds(2.0, 2.0 * batch) == 2.0


def test_a_gpus_key_knows_no_cores_of_the_host() -> None:
    found = dict(key_of(**{**KEY, "options": options(target="h100")}).problem)
    assert (found["cores"], found["processor"]) == (0, "")
