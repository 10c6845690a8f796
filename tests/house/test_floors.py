"""No import runs up a floor or across one, and the checker itself sees those that do."""

from __future__ import annotations

import pytest

import tilewright
from house.floors import absolute_imports, violations
from house.tree import Source, sources

FACADE = {"compile": ".compiler.api", "Target": ".targets"}


@pytest.mark.quick
def test_the_package_keeps_its_floors():
    found = [line for source in sources() for line in violations(source, tilewright._HOME)]
    assert not found, "\n".join(found)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ir/graph.py", "from ..passes.fuse import run"),
        ("ir/graph.py", "from .. import passes"),
        ("ir/ops/matmul.py", "from ...codegen import base"),
        ("ir/__init__.py", "from ..runtime.engine import Engine"),
        ("ir/graph.py", "from ..formats.gguf import read"),
        ("formats/gguf.py", "from ..ir.types import DType"),
        ("passes/fuse.py", "from ..autotune.space import Space"),
        ("targets/table.py", "import tilewright.ir"),
        ("targets/table.py", "import tilewright.ir.types as types"),
        ("targets/table.py", "from tilewright.ir import types"),
        ("targets/table.py", "from tilewright import ir"),
        ("codegen/eager/run.py", "def f():\n    from ...passes.fuse import run"),
        ("codegen/eager/run.py", "from ...formats import weights"),
        ("runtime/engine.py", "from ..passes.pipeline import run"),
        ("runtime/engine.py", "if TYPE_CHECKING:\n    from ..compiler.api import compile"),
        ("runtime/engine.py", "from .. import compile"),
        ("runtime/engine.py", "import importlib\nimportlib.import_module('tilewright.compiler')"),
        ("runtime/engine.py", "from importlib import import_module as im\nim('..compiler', 'x')"),
        ("runtime/engine.py", "HOME = {'x': '..passes.fuse:run'}\nimport_module(HOME['x'])"),
        ("runtime/engine.py", "import_module(f'..compiler.{name}', __package__)"),
        ("runtime/engine.py", "__import__('tilewright.serving.http')"),
        ("misc/new.py", "import os"),
    ],
)
def test_an_import_up_or_across_is_found(path, text):
    assert len(violations(Source(path, text), FACADE)) == 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ir/graph.py", "from .types import DType\nfrom . import text"),
        ("ir/ops/matmul.py", "from ..types import DType\nfrom ...targets import Target"),
        ("ir/graph.py", "from ..errors import GraphError\nfrom ..settings import current"),
        ("ir/graph.py", "from .. import __version__\nfrom .. import errors"),
        ("ir/graph.py", "from .. import Target"),
        ("ir/graph.py", "import ast\nfrom collections import abc\nimport passes"),
        ("passes/fuse.py", "from ..ir.graph import Graph\nfrom ..formats.weights import Concat"),
        ("codegen/onnx/build.py", "from ...ir.graph import Graph\nfrom ..base import Backend"),
        ("codegen/__init__.py", "import_module(f'.{name}', __package__)"),
        ("runtime/engine.py", "from ..codegen.base import Program\nfrom ..formats import weights"),
        ("runtime/engine.py", "import_module('..codegen.eager', __package__)"),
        ("runtime/engine.py", "NOTE = '..passes.fuse'  # a string alone imports nothing"),
        ("compiler/api.py", "from ..passes.pipeline import run\nfrom ..runtime import engine"),
        ("__init__.py", "from .compiler.api import compile"),
    ],
)
def test_an_import_within_the_rules_is_let_through(path, text):
    assert violations(Source(path, text), FACADE) == []


@pytest.mark.quick
def test_the_package_imports_itself_relatively():
    found = [line for source in sources() for line in absolute_imports(source)]
    assert not found, "\n".join(found)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import tilewright", 1),
        ("import os, tilewright.ir as ir", 1),
        ("from tilewright.ir import graph", 1),
        ("from .graph import Graph\nfrom ..errors import GraphError", 0),
        ("import tilewright_plugins", 0),
    ],
)
def test_an_absolute_import_of_ours_is_found(text, count):
    assert len(absolute_imports(Source("ir/a.py", text))) == count
