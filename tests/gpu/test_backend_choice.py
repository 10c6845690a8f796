"""The choice of a backend on a GPU: Triton against the others that are there, by whole engines."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from tilewright.compiler.tuning import tuning_store
from tiny_models import PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu


def test_a_measured_choice_is_recorded_looked_up_and_right(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    model = tiny_model("llama").to(torch.float32)
    options = {"max_model_len": 64, "max_batch_size": 4}
    engine = tw.compile(model, tune=tw.TuneConfig(trials=4), **options)
    facts = engine.report()["backend"]
    assert facts["how"] == "measured" and facts["name"] == engine.image.backend
    for name in ("triton", "eager"):
        tried = facts["tried"][name]
        # A time, or a reason of time: none of them is wrong, or dies.
        assert isinstance(tried, float) or tried.startswith("too_slow"), facts
    (record,) = [r for r in tuning_store().records() if r.key.template == "backend"]
    assert record.config.to_json() == {"backend": facts["name"]}
    assert record.key.device == engine.image.target
    del engine
    torch.cuda.empty_cache()
    later = tw.compile(model, **options)
    assert later.image.backend == facts["name"]
    params = tw.SamplingParams(max_new_tokens=16, ignore_eos=True)
    found = [completion.token_ids for completion in later.generate(PROMPTS, params)]
    assert found == [greedy(model, prompt, 16) for prompt in PROMPTS]
