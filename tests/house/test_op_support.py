"""The page of ops, backends and precisions says what a run finds."""

from __future__ import annotations

import pytest

from op_support import COLUMNS, DECOMPOSED, FALLBACK, NATIVE, TABLE, Answer, cases, page

REMEDY = "docs/ops.md is not what a run finds: python tests/op_support.py writes it anew"


@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_a_run_finds() -> None:
    assert TABLE.read_text(encoding="utf-8") == page(), REMEDY


def test_each_answer_is_given() -> None:
    """Against a classification that says the same of everything."""
    known = {(case.op, case.precision): case for case in cases()}
    answers = {
        ("linear", "f32"): (NATIVE, NATIVE),
        ("silu", "f32"): (NATIVE, DECOMPOSED),
        ("topk", "f32"): (FALLBACK, NATIVE),
    }
    for key, wanted in answers.items():
        found = tuple(COLUMNS[name](known[key]).how for name in ("triton", "ONNX, standard"))
        assert found == wanted
    assert COLUMNS["ONNX, standard"](known["sample", "f32"]) == Answer(FALLBACK, "no ONNX form")
