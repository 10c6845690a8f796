"""``tilewright tune MODEL`` chooses a backend too: its row, budget, Ctrl-C, what explain says."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from cli_running import refused, run
from fake_backends import FakeRivals, pool
from tilewright.autotune.tunable import Ready
from tilewright.codegen.base import backend_names
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.compiler import backend_choice, backend_tunable, decode_tunable, tuning
from tilewright.compiler.cli import tune as verb
from tilewright.compiler.tuning import CUT_SHORT, tuning_store
from tilewright.targets import TARGETS, Target
from tuning_players import Steady, gemm_problems

FASTER = {"onnxruntime": 1.0, "eager": 0.5, "triton": 1.0}


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """A model that is fake from there on where its graph would be captured."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(backend_tunable, "save_engine", lambda image, path, how: path.mkdir())
    monkeypatch.setattr(backend_choice, "Pool", lambda limits: pool(FASTER))
    monkeypatch.setattr(
        "tilewright.compiler.api.backend_rivals",
        lambda model, of, phases: FakeRivals().rivals(of) if of.rivals else None,
    )
    path = tmp_path / "model.gguf"
    path.touch()
    return path


def measured(*arguments: object, code: int = 0):
    result = run("tune", *arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout), result.stderr


def test_a_model_gets_a_row_for_its_backend_with_the_gain_and_its_interval(model) -> None:
    (one,), _ = measured(model)
    assert (one["problem"], one["known"]) == ("backend of fake", False)
    assert one["gain"] == pytest.approx(2.0)
    low, high = one["gain_interval"]
    assert low <= 2.0 + 1e-9 and high >= 2.0 - 1e-9
    became = {o["config"]["backend"]: o["status"] for o in one["outcomes"]}
    assert set(became) == set(backend_names())
    assert {name for name, status in became.items() if status == "ok"} == {"eager", "onnxruntime"}
    (again,), _ = measured(model, "--only", "backend")
    assert again["known"] and again["gain_interval"] is None and again["gain"] == one["gain"]


def test_the_table_has_milliseconds_and_the_backends_name(model) -> None:
    said = run("tune", model).stdout
    for part in ("backend of fake", "1000.0 ms", "500.0 ms", "2.000× [", "backend=eager"):
        assert part in said, said


def test_on_a_gpu_it_comes_behind_the_kernels(model, monkeypatch) -> None:
    problems = gemm_problems(1)
    monkeypatch.setattr(Target, "detect", staticmethod(lambda: TARGETS["h100"]))
    monkeypatch.setattr(KernelTunable, "prepare", lambda _, cs: {c: Ready(str(c)) for c in cs})
    monkeypatch.setattr(tuning, "Pool", lambda: Steady.pool(problems))
    monkeypatch.setattr(tuning, "problems_of_image", lambda image: problems)
    monkeypatch.setattr(decode_tunable, "tunable_image", lambda *_: nullcontext(()))
    monkeypatch.setattr(
        verb, "image_of", lambda model, **options: type("I", (), {"target": "h100"})
    )
    found, _ = measured(model, "--trials", "4")
    assert [one["problem"].split()[0] for one in found] == ["linear_gemm", "backend"]
    assert found[1]["record"]["default"] == {"backend": "triton"}
    assert found[1]["record"]["config"] == {"backend": "eager"}
    found, _ = measured(model, "--only", "linear_gemm")
    assert len(found) == 1


def test_explain_says_what_is_known_of_it_and_which_field_differs(model, monkeypatch) -> None:
    assert "miss" in run("tune", "explain", model).stdout
    measured(model)
    said = run("tune", "explain", model).stdout
    assert "hit (exact)" in said and "backend=eager" in said
    monkeypatch.setattr(backend_tunable, "available_cores", lambda: 77)
    said = run("tune", "explain", model, "--only", "backend").stdout
    assert "problem.cores: asked 77" in said, said


def test_ctrl_c_keeps_what_was_found(model, monkeypatch) -> None:
    interrupted = pool(FASTER, {"eager": "ctrl_c"})
    monkeypatch.setattr(backend_choice, "Pool", lambda limits: interrupted)
    _, said = measured(model, code=130)
    assert "interrupted: 1 of 1 problems are in the store" in said
    assert [r.budget for r in tuning_store().records()] == [f"quick{CUT_SHORT}"]


def test_ctrl_c_while_candidates_are_compiled_ends_it(model, monkeypatch) -> None:
    def interrupted(self, configs):
        raise KeyboardInterrupt

    monkeypatch.setattr(backend_tunable.BackendTunable, "prepare", interrupted)
    (one,), said = measured(model, code=130)
    assert not one["reached"] and "0 of 1" in said and not tuning_store().records()


def test_a_budget_of_zero_measures_nothing_and_what_is_over_is_not_reached(model) -> None:
    (one,), _ = measured(model, "--trials", "0")
    assert one["record"] is None and "nothing was measured" in one["notes"][0]
    (one,), said = measured(model, "--seconds", "1e-9")
    assert not one["reached"] and "was not reached: 1" in said


def test_misuse_is_refused(model) -> None:
    refused(run("tune", model, "--only", "backend", "--backend", "eager"), "--backend auto")
    refused(run("tune", model, "--target", "h100"), "a GPU of sm_90")
