"""``tilewright tune`` chooses the way of decode steps too: rows, ``--only``, Ctrl-C, and what
explain and inspect say.
"""

from __future__ import annotations

import json

import pytest
import torch

import tilewright as tw
from canned_binaries import canned_binaries
from cli_running import refused, run
from decode_steps import pool, times
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.compiler import decode_tunable, tuning
from tilewright.compiler.cli import tune as verb
from tilewright.compiler.decode_choice import config_of
from tilewright.compiler.tuning import tuning_store
from tilewright.runtime.folder import load_image
from tilewright.targets import TARGETS, Target
from tiny_models import tiny_model
from tuning_records import choice_of

ONLY = ("--only", "decode_step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An engine for an H100."""
    path = tmp_path_factory.mktemp("steps") / "engine"
    model = tiny_model("llama").to(torch.bfloat16)
    with canned_binaries():
        tw.compile(model, target="h100", max_batch_size=2, max_model_len=64, verify="off").save(
            path
        )
    return path


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    """An H100 whose workers time by a table; kernels are tuned by nobody, in no time."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(Target, "detect", staticmethod(lambda: TARGETS["h100"]))
    monkeypatch.setattr(decode_tunable, "Pool", lambda limits: pool(times(b1=0.5)))
    with canned_binaries():
        yield


def measured(*arguments: object, code: int = 0):
    result = run("tune", *arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout), result.stderr


def test_each_step_gets_a_row_and_is_known_the_next_time(folder) -> None:
    found, _ = measured(folder, *ONLY)
    assert [one["problem"].split()[0] for one in found] == ["decode_step"] * 2
    assert [one["record"]["config"]["decode"] for one in found] == ["persistent", "kernels"]
    assert [one["gain"] for one in found] == pytest.approx([2.0, 1.0])
    again, _ = measured(folder, *ONLY)
    assert all(one["known"] for one in again)
    text = run("tune", folder, *ONLY).stdout
    assert "sequences=1" in text and "decode=persistent" in text and "the default" in text


def test_steps_come_behind_kernels_and_again_where_these_were_measured(folder, monkeypatch) -> None:
    measured(folder, *ONLY)
    made = tuning.TunedProblem
    record = tuning_store().records()[0]
    monkeypatch.setattr(verb, "_tuned", lambda *_, **__: ([made(None, record, object())], False))
    monkeypatch.setattr(verb, "_tell", lambda done, *_: told.extend(done))
    monkeypatch.setattr(decode_tunable, "Pool", lambda limits: pool(times(b2=0.5)))
    told: list[tuning.TunedProblem] = []
    assert run("tune", folder, "--trials", "4").exit_code == 0
    assert [one.record.config["decode"] for one in told[1:]] == ["kernels", "persistent"]


def test_explain_and_the_report_say_what_a_record_says(folder, tmp_path) -> None:
    assert "miss" in run("tune", "explain", folder, *ONLY).stdout
    measured(folder, *ONLY)
    said = run("tune", "explain", folder, *ONLY).stdout
    assert "hit (exact)" in said and "config: decode=persistent" in said
    assert "2.00 times as long" in said
    with decode_tunable.tunable_image(load_image(folder), None) as (one, _):
        record = choice_of(one, conditions=conditions_here(driver=True))
    launch = config_of("persistent")
    tuning_store().add(type(record)(**{**fields(record), "failed": ((launch, "wrong: 7 times"),)}))
    said = run("tune", "explain", folder, *ONLY).stdout
    assert "rejected: decode=persistent: wrong: 7 times" in said


def fields(record):
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.parametrize(("at", "reached", "kept"), [(1, [True, False], 0), (2, [True, True], 1)])
def test_ctrl_c_keeps_what_was_found(folder, monkeypatch, at, reached, kept) -> None:
    class Stops:
        def __getitem__(self, batch):
            if batch == at:
                raise KeyboardInterrupt
            return times(b1=0.5)[batch]

    monkeypatch.setattr(decode_tunable, "Pool", lambda limits: pool(Stops()))
    found, said = measured(folder, *ONLY, code=130)
    assert [one["reached"] for one in found] == reached
    assert f"interrupted: {kept} of 2 problems are in the store" in said
    assert len(tuning_store().records()) == kept


def test_a_budget_that_is_over_reaches_none_and_zero_measures_nothing(folder) -> None:
    found, said = measured(folder, *ONLY, "--seconds", "1e-9")
    assert "were not reached: 1-2" in said and not tuning_store().records()
    found, _ = measured(folder, *ONLY, "--trials", "0")
    assert [one["record"] for one in found] == [None, None]
    assert all("nothing was measured" in one["notes"][0] for one in found)


def test_where_no_step_can_be_one_launch_asking_for_it_is_an_error(folder, monkeypatch) -> None:
    monkeypatch.setattr("tilewright.compiler.decode_choice.SINCE", 100)
    for words in (("tune",), ("tune", "explain")):
        refused(run(*words, folder, *ONLY), "one launch for all layers", "sm_100 or later")
    found = json.loads(run("tune", "explain", folder, "--json").stdout)
    assert found and not any(one["key"]["template"] == "decode_step" for one in found)


def test_how_decode_steps_run_is_an_option_of_compile(gguf, tmp_path) -> None:
    command = ("compile", gguf, "-o", tmp_path / "e", "--target", "cpu", "--decode")
    refused(run(*command, "graph"), "option decode", "auto, kernels, persistent")
    refused(run(*command, "persistent"), "option decode='persistent'", "the backend is onnxruntime")
    refused(run(*command, "persistent", "--emit", "onnx"), "option --decode", "no kernels")
    assert not (tmp_path / "e").exists()
