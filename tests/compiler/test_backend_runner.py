"""Engines of a tiny model by each backend that a CPU has, measured: any may win, all are right."""

from __future__ import annotations

import pytest

import tilewright as tw
from fake_backends import InProcess
from tilewright.autotune.pool import Pool
from tilewright.codegen.base import backend_names
from tilewright.compiler import backend_choice
from tilewright.compiler.backend_runner import BackendRunner, Work
from tilewright.compiler.backend_tunable import config_of
from tilewright.compiler.inspect.facts import headline
from tiny_models import greedy, tiny_model

WORK = Work(6, 2, 2)
PROMPT = [3, 14, 15, 92, 6]


class Measured:
    """A tiny model that was compiled with tune="quick", and the runner that measured it."""

    def __init__(self, folder) -> None:
        self.model, self.runner = tiny_model("llama"), None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TILEWRIGHT_CACHE", str(folder))
            patch.setenv("TILEWRIGHT_VERIFY", "structure")
            patch.setattr(Work, "of", classmethod(lambda cls, *sizes: WORK))
            patch.setattr(backend_choice, "_ROUNDS", 1)
            patch.setattr(backend_choice, "Pool", lambda limits: Pool(start=self.worker))
            options = {"target": "cpu", "max_model_len": 32, "max_batch_size": 2}
            self.engine = tw.compile(self.model, **options, tune="quick")
        self.facts = self.engine.report()["backend"]

    def worker(self) -> InProcess:
        return InProcess(self.build)

    def build(self, spec) -> BackendRunner:
        self.runner = BackendRunner(spec)
        return self.runner


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measured:
    return Measured(tmp_path_factory.mktemp("cache"))


def test_whoever_wins_gives_the_tokens_of_hugging_face(measured) -> None:
    facts, engine = measured.facts, measured.engine
    assert facts["name"] == engine.image.backend and facts["how"] == "measured"
    assert set(facts["tried"]) == set(backend_names())
    params = tw.SamplingParams(max_new_tokens=8, ignore_eos=True)
    (found,) = engine.generate([PROMPT], params)
    assert found.token_ids == greedy(measured.model, PROMPT, 8)


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_each_engine_is_held_against_the_reference(measured, backend) -> None:
    runner, config = measured.runner, config_of(backend)
    assert runner.check(config) < 0.5
    (seconds,) = runner.time(config, 1)
    assert 0 < seconds < 60


def test_an_engine_that_computes_something_else_is_found_out(measured) -> None:
    runner, eager = measured.runner, config_of("eager")
    constants = runner.engines["eager"].runner.constants
    name = next(name for name, x in constants.items() if x.dim() == 2)
    kept = constants[name]
    for wrong, error in ((kept * 1.01, 1.0), (kept * float("nan"), float("inf"))):
        constants[name] = wrong
        assert error <= runner.check(eager) and (error == 1.0 or runner.check(eager) == error)
    constants[name] = kept
    assert runner.check(eager) < 0.5


def test_the_report_says_what_was_chosen_and_why(measured) -> None:
    lines = dict(headline(measured.engine.image))
    assert measured.facts["why"] in lines["chosen"] and lines["chosen"].startswith("measured")
