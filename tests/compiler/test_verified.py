"""Numeric checks are made once: again for other code, graphs, kernels or weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tilewright as tw
from tilewright.compiler import compile_checks, graphs, verified
from tilewright.errors import VerificationError
from tilewright.ir.build import const, make
from tilewright.ir.dtypes import DType
from tilewright.passes.fuse import FUSE
from tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "sample")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The errors of the checks that are really made."""
    made = []
    check = compile_checks.Checks._program_error

    def counted(self, *args):
        made.append(check(self, *args))
        return made[-1]

    monkeypatch.setattr(compile_checks.Checks, "_program_error", counted)
    return made


def compiled(folder: Path, **options):
    return tw.compile(folder, backend="eager", target="cpu", **options).report()


def test_the_same_compile_checks_once_and_reports_the_same_error(folder, checks) -> None:
    first = compiled(folder)["largest_error"]
    assert len(checks) == 1 and first is not None
    assert compiled(folder)["largest_error"] == first and len(checks) == 1


def test_other_weights_dtypes_and_code_are_checked_anew(folder, checks, monkeypatch) -> None:
    compiled(folder)
    compiled(folder, dtype="bfloat16")
    assert len(checks) == 2
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(folder)
    compiled(folder)
    assert len(checks) == 3
    monkeypatch.setattr(verified, "code_digest", lambda: "another release")
    compiled(folder)
    assert len(checks) == 4


def test_a_pass_that_goes_wrong_is_found_after_a_check_that_passed(folder, monkeypatch) -> None:
    compiled(folder)

    def shifted(graph):
        logits = graph.outputs[0]
        return graph.with_outputs((make("add", logits, const(1.0, DType.F32)), *graph.outputs[1:]))

    pipeline = graphs.pipeline
    wrong = replace(FUSE, name="wrong", run=shifted)
    monkeypatch.setattr(graphs, "pipeline", lambda *a: (*pipeline(*a), wrong))
    with pytest.raises(VerificationError, match="wrong"):
        compiled(folder)


def test_a_damaged_entry_is_no_result(folder, checks, tmp_path) -> None:
    compiled(folder)
    (entry,) = (tmp_path / "cache" / "verified").glob("*.json")
    for text in ("", "[]", '{"largest_error": "small"}', '{"largest_error": NaN}'):
        entry.write_text(text)
        compiled(folder)
    assert len(checks) == 5


def test_a_model_in_memory_is_checked_each_time(folder, checks) -> None:
    for _ in range(2):
        tw.compile(tiny_model("llama"), backend="eager", target="cpu")
    assert len(checks) == 2
