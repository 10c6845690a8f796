"""The defects that benchmarks/gpu/check_regress.py plants on a device: each still has its place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_each_spoils_one_line_that_is_there(monkeypatch) -> None:
    path = ROOT / "benchmarks" / "gpu" / "check_regress.py"
    spec = importlib.util.spec_from_file_location("check_regress", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # its dataclasses ask
    spec.loader.exec_module(script)
    assert script.DEFECTS
    for defect in script.DEFECTS:
        text = (ROOT / defect.file).read_text(encoding="utf-8")
        assert text.count(defect.before) == 1, defect.name
        compile(text.replace(defect.before, defect.after), defect.file, "exec")
