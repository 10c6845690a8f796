"""The examples run as they stand, and print what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMISES = {
    "01_compile_hugging_face.py": ["equal to Hugging Face: True", "saved and loaded: True"],
    "02_hand_written_gpt.py": ["equal to the module's own: True"],
    "03_encoder_and_mlp.py": ["MLP, batch 512", "another shape is refused: input"],
    "04_torch_compile.py": ["weights were changed", "gradient of the first layer: (256, 64)"],
    "05_cross_compile.py": [
        "compiled for h100",
        "paged_decode",
        "b200: at least",
        "@triton.jit",
    ],
    "06_programs.py": ["branch 2: ", "the card has its form: True", "liked: "],
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("0*.py")} == set(PROMISES)


# What these show is tested in tests/compiler/inspect and tests/serving too, of smaller models.
LONG = ("05_cross_compile.py", "06_programs.py")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.nightly if n in LONG else ()) for n in PROMISES],
)
def test_example(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    # What the example says of checks holds, not what tests ask of every compile.
    monkeypatch.delenv("TILEWRIGHT_VERIFY")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    for promise in PROMISES[name]:
        assert promise in said, said
    assert "False" not in said
