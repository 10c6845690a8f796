"""No pickle and no code out of data anywhere in the package."""

from __future__ import annotations

import pytest

from house.tree import Source, sources
from house.unsafe import unsafe


@pytest.mark.quick
def test_the_package_runs_no_code_out_of_data():
    found = [line for source in sources() for line in unsafe(source)]
    assert not found, "\n".join(found)


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import marshal",
        "def f():\n    import cloudpickle",
        "from torch import load",
        "torch.load(path)",
        "torch.save(x, path)",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "builtins.eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_an_unsafe_line_is_found(text):
    assert len(unsafe(Source("ir/a.py", text))) == 1


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "ast.literal_eval(text)",
        "re.compile('a')",
        "torch.compile(model)",
        "from .api import compile\ncompile(model)",
        "def compile(x): ...\ncompile(1)",
        "np.load(path, allow_pickle=False)",
        "safetensors.torch.load_file(path)",
        "# pickle\nname = 'pickle'",
    ],
)
def test_a_safe_line_is_let_through(text):
    assert unsafe(Source("ir/a.py", text)) == []
