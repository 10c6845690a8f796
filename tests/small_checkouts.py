"""Checkouts that are small enough for tests: a package of a few files, in a folder of any name."""

from __future__ import annotations

from pathlib import Path

from house.tree import ROOT
from tilewright.compiler.regress.checkout import Checkout

# What a worker needs of us: enough to answer, without torch.
_OURS = (
    "errors.py",
    "settings.py",
    "formats/hashing.py",
    "compiler/regress/checkout.py",
    "compiler/regress/timing/worker.py",
)
_FOLDERS = ("formats", "compiler", "compiler/regress", "compiler/regress/timing")


def small_checkout(folder: Path, **modules: str) -> Checkout:
    """A checkout with modules of these texts, and with `serve` of ours."""
    texts = {name: (ROOT / name).read_text("utf-8") for name in _OURS}
    texts |= {"__init__.py": "", **{f"{name}/__init__.py": "" for name in _FOLDERS}}
    texts |= {f"{name}.py": text for name, text in modules.items()}
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Checkout.at(folder)


def serving(setup: str) -> str:
    """The text of a module that answers; ``setup`` is the body of its setup function."""
    lines = "".join(f"    {line}\n" for line in setup.strip("\n").splitlines())
    serve = "from .compiler.regress.timing.worker import serve\n"
    return f"import os, sys\n{serve}def setup():\n{lines}serve(setup)\n"
