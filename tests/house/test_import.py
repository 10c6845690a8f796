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
for use in ("", *sys.argv[1:]):
    exec(use)
    torch = sys.modules.get("torch")
    print(json.dumps({
        "seconds": time.perf_counter() - start,
        "modules": sorted(sys.modules),
        "cuda": torch is not None and torch.cuda.is_initialized(),
    }))
"""


def _probe(*uses: str) -> list[dict[str, object]]:
    """What there is after the import alone, and after each further use in the same process."""
    command = [sys.executable, "-c", PROBE, *uses]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _heavy(probe: dict[str, object]) -> list[str]:
    return [m for m in ("transformers", "onnxruntime", "triton") if m in probe["modules"]]


def test_the_import_is_quick_and_light():
    _probe()  # brings the files into the page cache
    (probe,) = _probe()
    assert probe["seconds"] < MAX_SECONDS
    assert not _heavy(probe)
    assert "torch" not in probe["modules"]
    assert not probe["cuda"]


def test_neither_loading_nor_compiling_imports_more_than_it_needs():
    """An engine is loaded without compiler and passes, and neither asks for a device."""
    _, loaded, compiled = _probe(
        "tilewright.load, tilewright.SamplingParams, tilewright.Target", "tilewright.compile"
    )
    assert not _heavy(loaded) and not loaded["cuda"]
    prefixes = ("tilewright.compiler", "tilewright.passes")
    assert not [m for m in loaded["modules"] if m.startswith(prefixes)]
    assert not _heavy(compiled) and not compiled["cuda"]


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
