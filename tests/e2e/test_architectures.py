"""Hugging Face's tokens and logits, family by family, from engines that never call the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tilewright as tw
from captured_models import captured_model
from emitted_running import ROOM, agrees_with_hugging_face
from tilewright.errors import TilewrightError
from tilewright.runtime.bucketing import LengthBuckets
from tiny_models import NAMED, PROMPTS, greedy, tiny_model

NEW_TOKENS = 32
PARAMS = tw.SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
LOGITS_ATOL = 1e-4
# Named families of which a part runs on eager behind onnxruntime, and why.
PARTLY: dict[str, str] = {}
UNNAMED = ("llama_mqa", "qwen2_window", "phi", "cohere", "opt", "olmoe", "qwen3_moe", "gpt_oss")
# One KV head, a part that rotates, and a mixture each has another family here.
AT_NIGHT = ("llama_mqa", "phi", "olmoe")
# Tokens mix outside attention here.
RECURRENT = {"mamba": "layers.0.mixer.conv1d", "jamba": "layers.0.mamba.conv1d"}


@dataclass(frozen=True)
class Expected:
    """What Hugging Face gives: tokens for each prompt alone, logits [S, V] of each."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]


def _expected(model) -> Expected:
    with torch.no_grad():
        logits = [model(torch.tensor([p]), use_cache=False).logits[0] for p in PROMPTS]
    return Expected([greedy(model, prompt, NEW_TOKENS) for prompt in PROMPTS], logits)


def _forbid(model) -> None:
    """From here on the model, and each of its parts, raises when it is called."""

    def forward(*args, **kwargs):
        raise AssertionError("the engine called the original module")

    for part in model.modules():
        part.forward = forward


def _check(engine: tw.Engine, expected: Expected) -> None:
    found = engine.generate(PROMPTS, PARAMS)
    assert [completion.token_ids for completion in found] == expected.tokens
    counters = engine.counters
    # The last token of each sequence is sampled, and never goes through the model.
    assert counters.tokens_computed == sum(len(p) + NEW_TOKENS - 1 for p in PROMPTS)
    assert counters.recomputed_tokens == 0
    for prompt, logits in zip(PROMPTS, expected.logits, strict=True):
        torch.testing.assert_close(engine(torch.tensor(prompt)), logits, atol=LOGITS_ATOL, rtol=0)


@pytest.fixture(scope="module", params=NAMED)
def case(request: pytest.FixtureRequest):
    model, _ = captured_model(request.param)
    return request.param, model, _expected(model)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_named_family(case, backend: str) -> None:
    name, model, expected = case
    engine = tw.compile(model, backend=backend)
    report = engine.report()
    assert engine.config.kv_cache == {"eager": "paged", "onnxruntime": "slot"}[backend]
    assert report["aten"] == []
    if backend == "onnxruntime" and name not in PARTLY:
        assert set(report["calls"]) == {"onnxruntime"}, report["fallbacks"]
    if engine.config.kv_cache == "slot":  # all prompts in one batch, padded to the longest
        engine.loop.scheduler.buckets = LengthBuckets((max(map(len, PROMPTS)),))
    kept = {part: part.__dict__.get("forward") for part in model.modules()}
    _forbid(model)
    try:
        _check(engine, expected)
    finally:
        for part in kept:
            del part.forward
    longest = max(map(len, PROMPTS)) if engine.config.kv_cache == "slot" else 0
    assert engine.counters.padding_tokens == sum(max(longest - len(p), 0) for p in PROMPTS)


def test_named_family_emitted_as_onnx(case, tmp_path: Path) -> None:
    _, model, _ = case
    tw.export_onnx(model, tmp_path / "e", max_model_len=ROOM)
    agrees_with_hugging_face(tmp_path / "e", model)


def test_at_least_twelve_named_families_run_wholly_in_onnxruntime() -> None:
    assert set(PARTLY) <= set(NAMED)
    assert len(NAMED) - len(PARTLY) >= 12


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.nightly if n in AT_NIGHT else ()) for n in UNNAMED]
)
def test_unnamed_family(name: str) -> None:
    model = tiny_model(name)
    engine = tw.compile(model, backend="eager")
    _check(engine, _expected(model))


@pytest.mark.parametrize(("name", "place"), RECURRENT.items())
def test_recurrent_models_are_refused_with_the_place(name: str, place: str) -> None:
    with pytest.raises(TilewrightError, match=place):
        tw.compile(tiny_model(name), backend="eager")


def test_a_recurrent_model_compiles_for_a_fixed_length() -> None:
    model = tiny_model("mamba")
    inputs = {"input_ids": torch.tensor([PROMPTS[1]]), "use_cache": False}
    engine = tw.compile(model, inputs, backend="eager")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(engine(**inputs)["logits"], expected, atol=LOGITS_ATOL, rtol=0)


def test_a_refused_model_compiles_as_a_plain_module() -> None:
    model = tiny_model("bloom")
    engine = tw.compile(model, backend="eager", kv_cache=None)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(engine(ids), expected, atol=LOGITS_ATOL, rtol=0)
    assert not hasattr(engine, "generate")
