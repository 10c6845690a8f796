"""The host's part of a step, counted: the same each time, and more where more is done."""

from __future__ import annotations

import time

import pytest

from tilewright.codegen.triton.invocation import Invocation, plan_call
from tilewright.compiler.regress import host as module
from tilewright.compiler.regress.gates import judge, rule_of
from tilewright.compiler.regress.host import host_series, unlaunched_runners
from tilewright.runtime import decode_graphs
from tilewright.runtime.in_flight import Launcher
from tilewright.runtime.loop import GenerationLoop
from tilewright.runtime.runner import ProgramRunner


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCHES", (1, 8))
        yield


@pytest.fixture(scope="module")
def runners(few, tmp_path_factory):
    return unlaunched_runners(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def healthy(runners):
    return host_series(runners)


@pytest.fixture
def regressions(runners, healthy):
    """Names of the series that got worse, without versions."""

    def found():
        new = host_series(runners)
        assert new.keys() == healthy.keys()
        return {
            name.rsplit(" (", 1)[0]
            for name in new
            if judge(healthy[name], new[name], *rule_of("host", name)) == "regression"
        }

    return found


STEPS = {
    f"a decode step{graphs}, batch {batch}"
    for graphs in ("", " without graphs")
    for batch in (1, 8)
}


def test_what_is_counted(runners, healthy, regressions):
    assert regressions() == set()  # the second time is exactly as the first
    assert host_series(runners) == healthy
    assert runners.decode is not None and runners.decode.program is not runners.general.program
    names = {name.rsplit(" (", 1)[0] for name in healthy}
    assert {f"C calls {step}" for step in STEPS} | {"C calls a prefill"} <= names
    steps = module._STEPS + module._FIRST
    assert healthy["graph replays"] == 2 * steps  # of each batch
    assert healthy["buckets"] == 4
    assert healthy["padded rows"] == 0 + 0 + 1 + 0 + 3 + 2 + 1 + 0
    assert all(rule_of("host", name)[0] != "equal" for name in healthy)


def test_a_sleep_in_the_loop_is_found(monkeypatch, regressions):
    # Calls of C functions count where code of ours makes them, so it has to look like ours.
    space = {"__name__": GenerationLoop.__module__, "time": time, "real": GenerationLoop._step}
    exec("def slow(self, started):\n    time.sleep(0)\n    return real(self, started)\n", space)
    monkeypatch.setattr(GenerationLoop, "_step", space["slow"])
    found = regressions()
    assert {f"C calls {step}" for step in STEPS} <= found
    assert "C calls a prefill" in found


def test_plans_that_are_not_remembered_are_found(monkeypatch, regressions):
    monkeypatch.setattr(
        Invocation, "_plan", lambda self, sizes: plan_call(self.source, self.result_types, sizes)
    )
    found = regressions()
    for batch in (1, 8):
        assert f"python calls a decode step without graphs, batch {batch}" in found
        assert f"python calls a decode step, batch {batch}" not in found


def test_sizes_that_are_bound_anew_are_found(monkeypatch, regressions):
    def run(self, inputs, fresh=False, shared=False):
        self._bound = ([object()], {})
        return real(self, inputs)

    real = ProgramRunner.run
    monkeypatch.setattr(ProgramRunner, "run", run)
    assert "python calls a decode step without graphs, batch 1" in regressions()


def test_graphs_that_take_fewer_steps_and_wider_buckets_are_found(monkeypatch, regressions):
    real, takes = decode_graphs.is_decode, Launcher.takes
    monkeypatch.setattr(
        decode_graphs, "is_decode", lambda step: len(step.seq_lens) == 1 and real(step)
    )
    monkeypatch.setattr(
        Launcher, "takes", lambda self, plan: len(plan.chunks) == 1 and takes(self, plan)
    )
    found = regressions()
    assert "graph replays" in found
    assert "C calls a decode step, batch 8" in found
    assert "C calls a decode step, batch 1" not in found
    monkeypatch.setattr(module, "bucket_of", lambda count: 8)
    assert "padded rows" in regressions()
