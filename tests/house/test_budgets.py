"""Files and functions stay short, public names are typed and documented."""

from __future__ import annotations

import statistics

import pytest

from house import budgets
from house.tree import Source, sources


@pytest.mark.quick
def test_no_file_or_function_is_over_its_limit():
    found = [line for source in sources() for line in budgets.too_long(source)]
    assert not found, "\n".join(found)


@pytest.mark.quick
def test_the_median_file_is_short():
    lengths = [len(source.text.splitlines()) for source in sources()]
    assert statistics.median(lengths) < budgets.MAX_MEDIAN_FILE_LINES


@pytest.mark.quick
def test_nine_functions_in_ten_are_short():
    every = [f for source in sources() for f in budgets.functions(source) if not f.kernel]
    short = sum(f.lines < budgets.USUAL_FUNCTION_LINES for f in every)
    longest = sorted(every, key=lambda f: -f.lines)[:20]
    assert short / len(every) >= budgets.USUAL_SHARE, "\n".join(map(str, longest))


@pytest.mark.quick
def test_public_names_are_typed_and_documented():
    found = [line for source in sources() for line in budgets.undocumented(source)]
    assert not found, "\n".join(found)


def _function(lines: int) -> str:
    return "def f() -> None:\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("ir/a.py", "x = 1\n" * 500, 0),
        ("ir/a.py", "x = 1\n" * 501, 1),
        ("ir/a.py", _function(80), 0),
        ("ir/a.py", _function(81), 1),
        ("ir/a.py", "class C:\n    async " + _function(81).replace("\n", "\n    "), 1),
        ("codegen/triton/kernels/a.py", _function(200), 0),
        ("codegen/triton/kernels/a.py", _function(201), 1),
        ("codegen/persistent/a.py", "@gluon.jit\n" + _function(200), 0),
        ("codegen/persistent/a.py", "@triton.jit\n" + _function(201), 1),
        ("codegen/persistent/a.py", "@jit\n" + _function(81), 1),
    ],
)
def test_the_limits_are_where_they_should_be(path, text, count):
    assert len(budgets.too_long(Source(path, text))) == count


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f(x: int) -> int:\n    'Doc.'", 0),
        ("def f(x: int) -> int:\n    return x", 1),
        ("def f(x) -> int:\n    'Doc.'", 1),
        ("def f(x: int):\n    'Doc.'", 1),
        ("def f(*args, y, **more) -> int:\n    'Doc.'", 1),
        ("def _f(x):\n    return x", 0),
        ("class C:\n    x: int", 1),
        ("class C:\n    'Doc.'\n    def m(self, x: int) -> int:\n        'Doc.'", 0),
        ("class C:\n    'Doc.'\n    def m(self, x) -> int:\n        'Doc.'", 1),
        ("class C:\n    'Doc.'\n    def m(self, x: int) -> int: ...", 1),
        ("class C:\n    'Doc.'\n    @staticmethod\n    def m(x) -> int:\n        'Doc.'", 1),
        ("class C(Protocol[T]):\n    'Doc.'\n    def m(self, x: int) -> int: ...", 1),
        ("class C(Base):\n    'Doc.'\n    def m(self, x: int) -> int: ...", 0),
        ("class C(Base):\n    'Doc.'\n    def m(self, x) -> int: ...", 1),
        ("class _C:\n    def m(self, x): ...", 0),
    ],
)
def test_what_counts_as_documented(text, count):
    assert len(budgets.undocumented(Source("ir/a.py", text))) == count
