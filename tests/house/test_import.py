"""What `import tilewright` costs, and what it leaves alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tilewright
from house.tree import ROOT, Source

MAX_SECONDS = 3.0
PROBE = """
import json, sys, time
start = time.perf_counter()
import tilewright
{use}
seconds = time.perf_counter() - start
torch = sys.modules.get("torch")
print(json.dumps({{
    "seconds": seconds,
    "modules": sorted(sys.modules),
    "cuda": torch is not None and torch.cuda.is_initialized(),
}}))
"""


def _probe(use: str = "") -> dict[str, object]:
    command = [sys.executable, "-c", PROBE.format(use=use)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


def _heavy(probe: dict[str, object]) -> list[str]:
    return [m for m in ("transformers", "onnxruntime", "triton") if m in probe["modules"]]


def test_the_import_is_quick_and_light():
    _probe()  # brings the files into the page cache
    probe = _probe()
    assert probe["seconds"] < MAX_SECONDS
    assert not _heavy(probe)
    assert "torch" not in probe["modules"]
    assert not probe["cuda"]


def test_loading_an_engine_needs_neither_compiler_nor_passes():
    probe = _probe("tilewright.load, tilewright.SamplingParams, tilewright.Target")
    assert not _heavy(probe)
    assert not probe["cuda"]
    prefixes = ("tilewright.compiler", "tilewright.passes")
    assert not [m for m in probe["modules"] if m.startswith(prefixes)]


def test_compile_is_imported_without_transformers_or_a_device():
    probe = _probe("tilewright.compile")
    assert not _heavy(probe)
    assert not probe["cuda"]


@pytest.mark.quick
def test_each_public_name_resolves():
    for name in tilewright.__all__:
        assert getattr(tilewright, name) is not None
    assert set(tilewright.__all__) <= set(dir(tilewright))


@pytest.mark.quick
def test_the_lazy_names_are_those_that_type_checkers_see():
    source = Source("__init__.py", (ROOT / "__init__.py").read_text("utf-8"))
    guarded = next(node for node in source.tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: "." + statement.module
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == tilewright._HOME
    assert set(tilewright.__all__) == {*seen, "errors", "__version__"}


@pytest.mark.quick
def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compiel'"):
        _ = tilewright.compiel


@pytest.mark.quick
def test_the_root_is_imported_once():
    """Under one name only: a second import of the root would double every class in it."""
    files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items())}
    names = [n for n, f in files.items() if f and Path(f).resolve() == ROOT / "__init__.py"]
    assert names == ["tilewright"]
    assert import_module("tilewright") is tilewright
