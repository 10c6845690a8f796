"""Counting calls: whose, of what, and the same whatever else the process did or finds."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import types

import pytest

from regress_suites import GRAPH, HEAD, LLAMA
from tilewright.compiler.regress.counting import Counts, count_calls
from tilewright.ir.dims import evaluate
from tilewright.settings import current


@pytest.mark.quick
def test_calls_are_counted_and_the_profiler_of_others_stays():
    def f(n):
        return n and f(n - 1)

    def generator():
        yield from (1, 2, 3)

    assert count_calls(lambda: f(9), __name__) == (0, Counts(11))  # the lambda, and ten of f
    assert count_calls(lambda: list(generator()), __name__)[1] == Counts(5, 0)  # 4 resumptions
    assert count_calls(lambda: [time.sleep(0), time.sleep(0)], __name__)[1].c_calls == 2
    with pytest.raises(ZeroDivisionError):
        count_calls(lambda: 1 / 0)
    assert sys.getprofile() is None

    def watch(frame, event, argument):
        pass

    sys.setprofile(watch)
    try:
        count_calls(lambda: None)
        assert sys.getprofile() is watch
    finally:
        sys.setprofile(None)


def test_no_garbage_is_collected_meanwhile():
    assert gc.isenabled()
    assert count_calls(gc.isenabled)[0] is False
    with pytest.raises(ZeroDivisionError):
        count_calls(lambda: 1 / 0)
    assert gc.isenabled()
    gc.disable()
    try:
        count_calls(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_functions_of_the_package_count():
    def in_module(name):
        module = types.ModuleType(name)
        exec("def f(n):\n    return n and f(n - 1)", module.__dict__)
        return lambda: module.f(9)

    ours = ("tilewright.passes.p", "tilewright")
    others = ("tilewrights", "networkx.x", "tilewright.settings", "tilewright.compiler.regress.x")
    assert [count_calls(in_module(name))[1].calls for name in ours] == [10, 10]
    assert [count_calls(in_module(name))[1].calls for name in others] == [0] * 4
    assert count_calls(lambda: json.dumps([{"a": [1.5]}], indent=1))[1] == Counts()
    assert count_calls(current)[1] == Counts()
    assert count_calls(lambda: evaluate(3, {}))[1].calls >= 1


PROGRAM = """
import json, sys
from pathlib import Path
from regress_suites import suite_of
from tilewright.compiler.regress import collect
collect._keep = lambda *a: None
suite = suite_of(Path(sys.argv[1]), sys.argv[2])
found = {}
for name in sys.argv[3:]:
    case = next(c for c in suite.cases if c.name == name)
    found[name] = dict(collect._collect_one(case, "h100", False).series["compile"])
print(json.dumps(found))
"""


@pytest.mark.nightly
def test_the_same_in_every_process_and_after_other_cases(tmp_path):
    suite = HEAD + LLAMA.replace("num_hidden_layers = 2", "num_hidden_layers = 1") + GRAPH
    more = {f"SOME_VARIABLE_{i}": str(i) for i in range(100)}
    found = []
    for seed, extra, names in (("1", {}, ["norm", "tiny"]), ("2", more, ["tiny", "norm"])):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), suite, *names]
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        environment = {**os.environ, **extra, **own}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert min(sum(series.values()) for series in found[0].values()) > 1000
