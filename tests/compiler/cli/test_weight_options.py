"""--weights, --random-weights and --checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli_running import COMPILE, run

GENERATE = ("hello", "--no-chat", "--max-new-tokens", "4", "--json")


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "engine"
    result = run("compile", folder, "-o", path, *COMPILE, "--weights", "reference")
    assert result.exit_code == 0, result.stderr
    return path


def test_an_engine_by_reference_runs_from_another_place(
    folder: Path, reference: Path, tmp_path: Path
) -> None:
    assert not (reference / "weights").exists()
    moved = shutil.copytree(folder, tmp_path / "moved")
    for verb in (("generate", reference, *GENERATE), ("verify", reference), ("inspect", reference)):
        result = run(*verb, "--checkpoint", moved)
        assert result.exit_code == 0, result.stderr
    result = run("verify", reference, "--checkpoint", tmp_path / "absent")
    assert result.exit_code == 2
    assert "nothing there" in result.stderr


def test_a_checkpoint_for_a_model_is_misuse(folder: Path) -> None:
    result = run("generate", folder, *GENERATE, "--checkpoint", folder)
    assert result.exit_code == 2
    assert "--checkpoint" in result.stderr


def test_an_unknown_form_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    result = run("compile", folder, "-o", tmp_path / "e", "--weights", "linked")
    assert result.exit_code == 2
    assert "embed, reference" in result.stderr


def test_a_config_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    engine = tmp_path / "engine"
    result = run("compile", tmp_path, "-o", engine, *COMPILE)
    assert result.exit_code == 2
    assert "--random-weights" in " ".join(result.stderr.split())
    options = ("--random-weights", "3", "--weights", "reference", "--json")
    result = run("compile", tmp_path, "-o", engine, *COMPILE, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["report"]["model"]["random_weights"] == 3
    assert run("verify", engine).exit_code == 0
