"""`tilewright targets`: which devices kernels are compiled for, and what this machine has."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import torch

from cli_running import run
from tilewright import targets
from tilewright.targets import TARGETS, gpu_problem

pytestmark = pytest.mark.quick


def test_every_gpu_has_kernels_and_one_row_is_here():
    found = json.loads(run("targets", "--json").stdout)
    assert {row["name"]: row["kernels"] for row in found["targets"]} == {
        target.name: not target.is_cpu for target in TARGETS.values()
    }
    (here,) = (row["name"] for row in found["targets"] if row["here"])
    assert found["detected"].startswith(here)
    assert found["gpu_problem"] == gpu_problem() and found["triton"] == metadata.version("triton")


def test_the_table_marks_this_machine_and_the_architectures():
    text = run("targets").stdout
    for name, arch in (("a10", 86), ("rtx3090", 86), ("rtx5090", 120), ("b200", 100)):
        assert re.search(rf"^{name} .*sm_{arch} +yes ", text, re.MULTILINE)
    assert len(re.findall(r"\(this machine\)", text)) == 1
    assert f"Triton: {metadata.version('triton')}." in text
    if not torch.cuda.is_available():
        assert re.search(r"^cpu \(this machine\) +cpu +– ", text, re.MULTILINE)
        assert f"No GPU: {gpu_problem()}." in text


def test_a_machine_with_a_gpu_has_no_problem_to_tell(monkeypatch):
    monkeypatch.setattr(targets, "gpu_problem", lambda: None)
    monkeypatch.setattr(
        targets.Target, "detect", classmethod(lambda cls: TARGETS["h100"].override(sms=114))
    )
    text = run("targets").stdout
    assert "No GPU" not in text and "This machine: h100:sms=114." in text
    assert re.search(r"^h100 \(this machine\) ", text, re.MULTILINE)


def test_without_triton_it_says_that_kernels_cannot_be_compiled(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "Triton: not installed: kernels cannot be compiled here." in run("targets").stdout
    assert json.loads(run("targets", "--json").stdout)["triton"] is None
