"""Whether a decode step is one launch, on a GPU: both ways run, agree, are timed and recorded."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from persistent_forms import Model
from tilewright.autotune.effort import EFFORTS
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.compiler.decode_choice import SINCE, config_of
from tilewright.compiler.decode_runner import DecodeRunner
from tilewright.compiler.decode_tunable import tunable_steps, tune_steps
from tilewright.compiler.tuning import tuning_store
from tilewright.errors import KernelError
from tilewright.ir.parser import parse_graph
from tilewright.targets import Target
from tiny_models import greedy, tiny_model
from tuning_records import choice_of

pytestmark = pytest.mark.gpu
MODEL = Model(width=256, heads=8, kv_heads=2, dim=32, ffn=640, vocab=1000, page=16)
WIDE = Model(1024, layers=2, heads=16, kv_heads=8, dim=64, ffn=2048, vocab=2048, page=16)
"""Of a size that a ring of weights takes."""
KERNELS, ONE_LAUNCH = config_of("kernels"), config_of("persistent")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    if Target.detect().arch < SINCE:
        pytest.skip(f"steps are measured from sm_{SINCE} on")


@pytest.mark.parametrize("model", [MODEL, WIDE])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_both_ways_agree_are_timed_and_watched(model, batch) -> None:
    with tunable_steps(model.graph(), Target.detect(), batch, 8192, None) as steps:
        (step,) = (one for one in steps if one.problem.batch == batch)
        step.prepare([KERNELS, ONE_LAUNCH])
        runner = DecodeRunner(step.runner.spec)
        for config in (KERNELS, ONE_LAUNCH):
            runner.prepare(config)
            assert 0 <= runner.check(config) < 1
            assert all(0 < seconds < 0.01 for seconds in runner.time(config, 3))
            assert 0 <= runner.check(config) < 1  # a captured step leaves nothing behind
        launched = runner.runners["persistent"].steps
        (one,) = (kernel.decode for call, kernel in launched if "/persistent/" in call.kernel)
        one.memory["diagnosis"][:2] = torch.tensor([7, 1])
        with pytest.raises(KernelError, match="call 1 of"):
            runner.time(ONE_LAUNCH, 1)


def test_a_search_in_a_worker_records_both_times() -> None:
    store = tuning_store()
    with tunable_steps(MODEL.graph(), Target.detect(), 2, 1024, store) as steps:
        found = list(tune_steps(steps, EFFORTS["quick"], store))
    for one in found:
        record = one.record
        timed = {record.config, *(config for config, _ in record.runners_up)}
        # Both have a time, or a reason that is one of time: neither is wrong, or dies.
        slow = {config for config, reason in record.failed if reason.startswith("too_slow")}
        assert timed | slow == {KERNELS, ONE_LAUNCH}, record
        assert record.seconds <= record.default_seconds * 1.001


def test_an_engine_whose_record_says_one_launch_generates_what_hugging_face_does() -> None:
    model, store = tiny_model("llama").bfloat16(), tuning_store()
    options = {"max_model_len": 64, "max_batch_size": 4, "backend": "triton"}
    params = tw.SamplingParams(max_new_tokens=4)
    prompts = [[136, 114], [108, 150], [38, 0]]  # best logits are at least 0.34 apart
    wanted = [greedy(model, prompt, 4) for prompt in prompts]
    plain = tw.compile(model, **options)
    assert plain.report()["decode"]["way"] == "kernels"
    graph = parse_graph(plain.image.decode.graphs[-1][1])
    here = conditions_here(driver=True)
    with tunable_steps(graph, plain.target, 4, 64, store) as steps:
        for step in steps:
            if step.problem.batch != 2:
                store.add(choice_of(step, ONE_LAUNCH, conditions=here))
    engine = tw.compile(model, **options)
    ways = engine.report()["decode"]["steps"]
    assert {batch: one["way"] for batch, one in ways.items()} == {
        "1": "persistent",
        "2": "kernels",
        "4": "persistent",
    }
    assert [engine.generate([one], params)[0].token_ids for one in prompts] == wanted
    for count in (2, 3):  # 3 sequences are padded to 4
        found = engine.generate(prompts[:count], params)
        assert [one.token_ids for one in found] == wanted[:count]


def test_a_measuring_compile_says_why() -> None:
    model = tiny_model("llama").bfloat16()
    options = {"max_model_len": 64, "max_batch_size": 1, "backend": "triton"}
    engine = tw.compile(model, tune=tw.TuneConfig(trials=2), **options)
    (one,) = engine.report()["decode"]["steps"].values()
    assert one["how"] == "measured" and set(one["tried"]) == {"kernels", "persistent"}
    assert [r.key.template for r in tuning_store().records()].count("decode_step") == 1
