"""``tilewright tune`` without a GPU: an engine's problems, merging, misuse. What it measures is in
tests/gpu/test_tuning.py, its searches in tests/autotune.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tilewright as tw
from canned_binaries import canned_binaries
from cli_running import refused, run
from tilewright.autotune import search
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.key import Conditions, Key
from tilewright.autotune.record import Record
from tilewright.autotune.search import Tuned, quick_candidates
from tilewright.autotune.tunable import Ready
from tilewright.codegen.base import CHOICES
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.codegen.triton.tuning.registry import TEMPLATES
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.compiler import decode_tunable, tuning
from tilewright.compiler.cli.tune_view import Pace, spans
from tilewright.compiler.tuning import problems_of_image, record_of, tune_all, tuning_store
from tilewright.runtime.folder import load_image
from tilewright.targets import TARGETS, Target
from tiny_models import tiny_model
from tuning_players import Clock, Steady, gemm_problems
from tuning_records import choice_of

WALKS = ("rows", "elementwise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for an H100."""
    path = tmp_path_factory.mktemp("tune") / "engine"
    model = tiny_model("llama").to(torch.bfloat16)
    with canned_binaries():
        tw.compile(model, target="h100", max_batch_size=20, max_model_len=64).save(path)
    return path


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; kernels are compiled in it too, so tests take few."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    return tmp_path / "cache" / "tuning.jsonl"


def test_the_problems_of_an_engine_are_what_compiling_it_looks_up(folder) -> None:
    """Products at each bucket first, then attention; of decode steps, then of the general ones."""
    image = load_image(folder)
    problems = problems_of_image(image)
    names = [(p.template.name, dict(p.key.problem).get("tokens")) for p in problems[:3]]
    assert names == [("linear_gemv", 1), ("linear_gemm", 16), ("linear_gemm", 32)]
    decode = [dict(p.key.problem) for p in problems if p.template.name == "paged_decode"]
    assert [(p["sequences"], p["context"], p["lengths"]) for p in decode] == [
        (1, 2048, "mixed"),
        (8, 2048, "mixed"),
        (32, 2048, "mixed"),
    ]
    of_others = {"attention"}  # of modules; then those over codes, and of mixtures
    of_others |= {t.name for t in TEMPLATES if t.name.startswith(("quant_", "scaled_", "expert_"))}
    known = {template.name for template in TEMPLATES} - of_others
    assert {p.template.name for p in problems} == known
    rows = {dict(p.key.problem)["rows"] for p in problems if p.template.name in WALKS}
    assert rows == {32, 2048}
    digests = [p.key.digest for p in problems]
    assert len(set(digests)) == len(digests)
    lines = map(json.loads, image.files[CHOICES].splitlines())
    assert {Key.from_json(line["key"]).digest for line in lines} == set(digests)


def test_explain_says_what_the_store_lacks_and_then_has(folder, store) -> None:
    result = run("tune", "explain", folder)
    assert result.exit_code == 0 and "linear_gemv" in result.stdout and "miss" in result.stdout
    tunable = problems_of_image(load_image(folder))[0]
    tuning_store().add(made_of(tunable, triton="1.0"))
    found = json.loads(run("tune", "explain", folder, "--json").stdout)
    assert found[0]["how"] == "stale" and "triton" in json.dumps(found[0])


def made_of(tunable, triton: str) -> Record:
    return choice_of(tunable, conditions=Conditions(triton, None, "0"))


def test_searches_end_in_the_store_and_the_second_measures_nothing(folder, store) -> None:
    problems = problems_of_image(load_image(folder))[:2]
    with Steady.pool(problems) as pool:
        first = list(tune_all(problems, EFFORTS["quick"], tuning_store(), pool=pool))
        rounds = pool.rounds
        assert rounds > 0 and all(one.record is not None for one in first)
        again = list(tune_all(problems, EFFORTS["quick"], tuning_store(), pool=pool))
        assert pool.rounds == rounds
    assert [one.tuned for one in again] == [None, None]
    assert [one.record for one in again] == [one.record for one in first]
    assert len(tuning_store().records()) == 2
    assert all(one.gain is not None and one.gain >= 0.99 for one in first)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An H100 whose workers time configs by the prior, a compiler that takes no time, and problems
    of some size; called with what players take.
    """
    problems = gemm_problems(3)
    monkeypatch.setattr(tuning, "problems_of_image", lambda image: problems)
    monkeypatch.setattr(decode_tunable, "tunable_image", lambda *_: nullcontext(()))
    monkeypatch.setattr(Target, "detect", staticmethod(lambda: TARGETS["h100"]))
    monkeypatch.setattr(KernelTunable, "prepare", lambda _, cs: {c: Ready(str(c)) for c in cs})

    def plays(**options: object) -> None:
        monkeypatch.setattr(tuning, "Pool", lambda: Steady.pool(problems, **options))

    plays()
    return plays


def measured(*arguments: object, code: int = 0) -> tuple[list[dict], str]:
    result = run("tune", *arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout), result.stderr


def test_a_budget_of_trials_is_of_each_problem_and_of_the_effort(folder, device) -> None:
    found, said = measured(folder, "--trials", "3", "--only", "linear_gemm")
    assert {len(one["outcomes"]) for one in found} == {3} and "not reached" not in said
    assert {one["record"]["budget"] for one in found} == {"quick, 3 trials"}
    found, _ = measured(
        folder, "--trials", "3", "--seconds", "50", "--effort", "full", "--again",
        "--only", "linear_gemm",
    )  # fmt: skip
    assert {one["record"]["budget"] for one in found} == {"full, 3 trials, 50 s"}


@pytest.mark.parametrize("budget", [("--trials", "0"), ("--seconds", "0"), ("--effort", "none")])
def test_a_budget_of_zero_needs_no_device_and_says_so(folder, store, monkeypatch, budget) -> None:
    monkeypatch.setattr(tuning, "problems_of_image", lambda image: gemm_problems(3))
    result = run("tune", folder, *budget)
    assert result.exit_code == 0, result.output
    assert "nothing" in result.stderr and not store.exists()


def test_what_seconds_do_not_reach_is_listed_by_number(folder, device, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(tuning, "time", clock)
    monkeypatch.setattr(search, "time", clock)
    device(clock=clock)
    found, said = measured(folder, "--seconds", "30", "--only", "linear_gemm")
    assert [one["reached"] for one in found] == [True] + [False] * (len(found) - 1)
    assert f"{len(found) - 1} of {len(found)} problems were not reached: 2-{len(found)}" in said
    assert "not reached" not in json.dumps(found)  # stdout has the figures alone


def test_ctrl_c_says_how_far_it_came_and_how_to_go_on(folder, device, store, tmp_path) -> None:
    first, second, _ = gemm_problems(3)
    device(interrupt=(second.name, quick_candidates(second)[2]))
    plain = (folder, "--only", "linear_gemm")
    found, said = measured(*plain, code=130)
    assert f"interrupted: 2 of {len(found)} problems are in the store; the same command" in said
    assert [r.key for r in tuning_store().records()] == [first.key, second.key]
    device()
    on, _ = measured(*plain)
    assert [one["known"] for one in on] == [True] + [False] * (len(on) - 1)
    device(interrupt=(second.name, quick_candidates(second)[2]))
    journal = tmp_path / "study.log"
    _, said = measured(*plain, "--again", "--storage", journal, code=130)
    assert f"tilewright tune … --storage {journal} --resume goes on" in said


def test_ctrl_c_between_two_searches_keeps_the_first(folder, device, monkeypatch) -> None:
    def interrupted(tunable, *rest: object) -> None:
        if dict(tunable.key.problem)["tokens"] > 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_compile", interrupted)
    found, said = measured(folder, code=130)
    assert [one["reached"] for one in found] == [True, False, False]
    assert len(tuning_store().records()) == 1 and "interrupted: 1 of 3" in said


class Slower:
    """Steps whose new side takes 2% longer from 16 sequences on."""

    def __init__(self, old, new, batches) -> None:
        self.dice = random.Random(0)

    def seconds(self, side: str, batch: int) -> float:
        ratio = 1.02 if side == "new" and batch >= 16 else 1.0
        return 1e-3 * ratio * self.dice.uniform(0.999, 1.001)

    def reload(self) -> None:
        pass


@pytest.fixture
def recut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels wherever a store has a say."""

    def other(image, store):
        if store is None:
            return image
        return replace(image, decode=replace(image.decode, program=image.program))

    monkeypatch.setattr("tilewright.compiler.confirm.recut", other)
    monkeypatch.setattr("tilewright.compiler.confirm_steps.DecodeSteps", Slower)


def test_confirm_puts_back_what_made_a_step_slower(folder, device, recut) -> None:
    small, large, _ = gemm_problems(3)
    for tunable in (small, large):
        config = next(c for c in tunable.space.configs() if c != tunable.default)
        known = replace(made_of(tunable, "3.6"), conditions=conditions_here(driver=True))
        tuning_store().add(replace(known, config=config))
    result = run("tune", folder, "--confirm", "--json", "--trials", "0")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert len(found["problems"]) == 3
    verdicts = {one["batch"]: one["verdict"] for one in found["confirmed"]["verdicts"]}
    assert verdicts == {1: "same within 1%", 8: "same within 1%", 20: "slower"}
    low, high = found["confirmed"]["verdicts"][-1]["interval"]
    assert low <= 1.02 <= high
    (back,) = found["confirmed"]["put_back"]
    assert back["key"] == large.key.to_json() and back["config"] == large.default.to_json()
    said = run("tune", folder, "--confirm", "--batch", "1,8", "--trials", "0")
    assert said.exit_code == 0 and "same within 1%" in said.stdout, said.output


def test_confirm_of_the_same_kernels_measures_nothing(folder, device, recut) -> None:
    said = run("tune", folder, "--confirm", "--against", "before", "--trials", "0")
    assert said.exit_code == 0 and "the same kernels" in said.stdout, said.output


def test_misuse_of_confirm_is_refused_before_anything_is_tuned(folder, device, recut) -> None:
    refused(run("tune", folder, "--confirm", "--against", "after"), "defaults or before")
    refused(run("tune", folder, "--confirm", "--batch", "64"), "from 1 to 20")
    refused(run("tune", folder, "--confirm", "--batch", "x"), "--batch")
    assert not tuning_store().path.exists()


def test_the_time_left_is_by_the_pace_and_never_beyond_the_budget() -> None:
    clock = Clock()
    pace = Pace(4, 100.0, clock.monotonic)
    assert pace.left(0.0) == 100.0
    pace.end()  # known: it took no time
    clock.sleep(10.0)
    assert pace.left(0.5) == 50.0
    pace.end()
    assert Pace(4, None, clock.monotonic).left(0.0) is None
    clock.sleep(50.0)
    assert pace.left(0.0) == 40.0
    assert spans([1, 4, 5, 6, 9]) == "1, 4-6, 9"


def test_a_budget_of_nothing_measures_and_records_nothing(folder, store) -> None:
    problems = problems_of_image(load_image(folder))[:1]
    with Steady.pool(problems) as pool:
        (one,) = tune_all(problems, EFFORTS["none"], tuning_store(), pool=pool)
        assert pool.rounds == 0
    assert one.record is None and isinstance(one.tuned, Tuned)
    assert one.tuned.choice.config == problems[0].default
    assert record_of(problems[0], Conditions("3", None, "0"), one.tuned, EFFORTS["none"], 0) is None
    assert not store.exists()


def test_records_of_other_machines_are_merged(folder, store, tmp_path) -> None:
    tunable, other = problems_of_image(load_image(folder))[:2]
    files = []
    for number, one in enumerate((tunable, other)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(made_of(one, "3.6").line + "\n", encoding="utf-8")
        files.append(path)
    result = run("tune", "merge", *files)
    assert result.exit_code == 0, result.output
    assert len(tuning_store().records()) == 2
    again = json.loads(run("tune", "merge", *files, "--json").stdout)
    assert again["kept"] == 2


def test_a_kernel_is_explained_by_records_alone(folder, store) -> None:
    tunable = problems_of_image(load_image(folder))[1]
    assert json.loads(run("tune", "explain", "linear_gemm", "--json").stdout) == []
    tuning_store().add(made_of(tunable, conditions_here().triton))
    facts = dict(tunable.key.problem)
    shape = f"k={facts['k']} n={facts['n']} tokens={facts['tokens']}"
    for arguments in ([shape], shape.split()):
        (found,) = json.loads(run("tune", "explain", "linear_gemm", *arguments, "--json").stdout)
        assert found["key"] == tunable.key.to_json() and found["how"] == "stale"  # our version
    said = run("tune", "explain", "linear_gemm", shape, "--target", "a100").stdout
    assert "miss" in said and "device: asked a100, recorded h100" in said
    assert "arch: asked 80, recorded 90" in said


def test_a_kernels_name_is_no_path_and_a_path_no_kernel(folder, tmp_path, monkeypatch) -> None:
    refused(run("tune", "explain", "linear_gem"), "linear_gemv, linear_gemm, quant_linear_gemv")
    refused(run("tune", "explain", folder, "k=1"), "a SHAPE follows", "a path")
    refused(run("tune", "explain", "linear_gemm", "--dtype", "bfloat16"), "--dtype", "a fact")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear_gemm").symlink_to(folder)
    assert "no records" in run("tune", "explain", "linear_gemm").stderr
    assert "linear_gemv" in run("tune", "explain", "./linear_gemm").stdout
    said = run("tune", "explain", "--help").stdout
    assert all(template.name in said for template in TEMPLATES)


def test_unknown_facts_are_refused_with_those_that_exist(folder, store) -> None:
    tuning_store().add(made_of(problems_of_image(load_image(folder))[1], "3.6"))
    refused(run("tune", "explain", "linear_gemm", "m=3"), "behind, dtype, k, n, parts, tokens")
    refused(run("tune", "explain", "linear_gemm", "k"), "name=value")


def test_misuse_is_refused(folder) -> None:
    refused(run("tune", folder), "a GPU of sm_90", "merged")
    refused(run("tune", "explain", folder, "--only", "gemm"), "linear_gemm")
    refused(run("tune", folder, "--effort", "hasty"), "quick")
    refused(run("tune", folder, "--trials", "-1"), "trials")
    refused(run("tune", folder, "--quantize", "fp8"), "a model, which is quantized", "fp8")
    refused(run("tune", folder.parent, "--quantize", "fp9"), "fp9", "int8-weight")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("grpc://127.0.0.1:1", "gRPC"),
        ("nodialect://host/db", "nodialect"),
        ("no/such/folder/journal", "No such file"),
    ],
)
def test_a_storage_that_does_not_answer_is_said_before_anything_is_compiled(
    folder, device, monkeypatch, storage, words
) -> None:
    monkeypatch.setattr("tilewright.autotune.study.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(tuning, "problems_of_image", lambda image: pytest.fail("compiled"))
    refused(run("tune", folder, "--storage", storage), f"storage {storage}", words)


def test_a_storage_that_is_no_journal_is_left_alone(folder, device, tmp_path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("some\nnotes\n", encoding="utf-8")
    refused(run("tune", folder, "--storage", path), "no journal")
    assert path.read_text(encoding="utf-8") == "some\nnotes\n"


def test_an_unwritable_cache_is_said_with_the_switch(folder, device, tmp_path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(file))
    refused(run("tune", folder, "--trials", "2"), "tuning store", "TILEWRIGHT_CACHE")


def test_an_engine_without_kernels_of_ours_is_refused(tmp_path) -> None:
    tw.compile(tiny_model("llama"), target="cpu", backend="eager").save(tmp_path / "engine")
    refused(run("tune", "explain", tmp_path / "engine"), "Triton backend")


def test_a_damaged_file_is_a_line_of_warning_and_the_rest_is_merged(folder, tmp_path) -> None:
    tunable = problems_of_image(load_image(folder))[0]
    path = tmp_path / "half.jsonl"
    path.write_text(f"{{\n{made_of(tunable, '3.6').line}\n", encoding="utf-8")
    result = run("tune", "merge", path)
    assert result.exit_code == 0 and "1 records read" in result.stdout
    assert result.stderr.startswith("warning: ") and "UserWarning" not in result.stderr
