"""Generation on a GPU whose decode steps sample there, one step ahead of the host: the tokens that
the CPU draws, whatever joins, leaves, stops, fails or needs the host's sampler in between.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tilewright as tw
from sampling_oracle import acceptable
from tilewright.errors import VerificationError
from tilewright.runtime import GenerationLoop
from tilewright.runtime.sampling import SamplingState
from tiny_models import PROMPTS, VOCAB, greedy, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("left_idle")]
LONG = tw.SamplingParams(max_new_tokens=24, ignore_eos=True)
# Logits of two devices differ by 1e-4, and so may an interval's ends, of the whole.
EPSILON = 1e-3
RANDOM = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1},
]
PENALISED = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logprobs": 2},
    {"min_new_tokens": 5, "stop_token_ids": (3, 9)},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engine(model) -> tw.Engine:
    return tw.compile(model, backend="triton", max_batch_size=16)


@pytest.fixture(scope="module")
def on_cpu(model) -> tw.Engine:
    return tw.compile(model, backend="eager", target="cpu", max_batch_size=16)


def test_decode_steps_sample_on_the_device(engine) -> None:
    assert engine.executor.capabilities.samples == 16
    steps = engine.counters.steps
    engine.generate(PROMPTS[:1], LONG)
    assert engine.counters.steps == steps + 24 and engine.executor.graphs.samples


def test_rows_that_fill_a_bucket_are_told(engine) -> None:
    before = replace(engine.counters.padding)
    engine.generate(PROMPTS, LONG)  # three sequences in a bucket of four
    assert engine.counters.padding.decode - before.decode == 23


@pytest.mark.parametrize("given", RANDOM)
def test_random_tokens_are_those_of_the_cpu(given, engine, on_cpu, model) -> None:
    each = [replace(LONG, seed=seed, **given) for seed in range(len(PROMPTS) * 3)]
    prompts = [*PROMPTS, *PROMPTS, *PROMPTS]
    found = [c.token_ids for c in engine.generate(prompts, each)]
    expected = [c.token_ids for c in on_cpu.generate(prompts, each)]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= len(prompts) - 2
    for prompt, params, tokens in zip(prompts, each, found, strict=True):
        assert_drawn(model, prompt, params, tokens)


def assert_drawn(model, prompt, params, tokens) -> None:
    """Each token is one that the model's logits and the request's stream of numbers allow."""
    state = SamplingState(params, prompt, frozenset())
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
    cuts = (params.temperature, params.top_k, params.top_p, params.min_p)
    for place, token in enumerate(tokens):
        uniform = state.uniform(place)
        assert token in acceptable(logits[place], *cuts, uniform, EPSILON), (place, params)


def test_seeded_tokens_do_not_depend_on_the_batch(engine) -> None:
    params = replace(LONG, temperature=1.0, top_p=0.9, seed=5)
    others = [replace(LONG, temperature=1.5, seed=seed) for seed in range(9)]
    alone = engine.generate(PROMPTS[1:2], params)[0].token_ids
    mixed = engine.generate([PROMPTS[1], *PROMPTS * 3], [params, *others])[0].token_ids
    assert mixed == alone


def test_penalties_beside_greedy_and_random_rows(engine, on_cpu, model) -> None:
    """Rows that need the host's sampler make their steps wait; the others go on as before."""
    each = [replace(LONG, max_new_tokens=8 + 3 * i, **given) for i, given in enumerate(PENALISED)]
    each += [LONG, replace(LONG, temperature=1.0, seed=3), replace(LONG, max_new_tokens=3)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(each))]
    found, expected = (e.generate(prompts, each) for e in (engine, on_cpu))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert found[4].token_ids == greedy(model, prompts[4], 24)
    for ours, theirs in zip(found[2].logprobs, expected[2].logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_requests_join_and_leave_while_others_decode(engine, model) -> None:
    first = engine.stream(PROMPTS[0], LONG)
    tokens = {0: _take(first, 5)}
    second = engine.stream(PROMPTS[1], replace(LONG, max_new_tokens=6))
    tokens[1] = _take(second, 2)
    third = engine.stream(PROMPTS[2], LONG)
    tokens[2] = _take(third, 4)
    tokens[1] += [token for delta in second for token in delta.token_ids]
    third.close()  # in the middle of its completion, perhaps with a step in flight
    tokens[0] += [token for delta in first for token in delta.token_ids]
    assert tokens[0] == greedy(model, PROMPTS[0], 24)
    assert tokens[1] == greedy(model, PROMPTS[1], 6)
    assert tokens[2] == greedy(model, PROMPTS[2], 24)[: len(tokens[2])]


def test_a_stream_that_is_half_read_while_others_are_generated(engine, model) -> None:
    params = replace(LONG, temperature=1.0, top_k=20, seed=1)
    whole = engine.generate(PROMPTS[:1], params)[0].token_ids
    stream = engine.stream(PROMPTS[0], params)
    tokens = _take(stream, 4)
    others = engine.generate(PROMPTS, LONG)
    assert [c.token_ids for c in others] == [greedy(model, prompt, 24) for prompt in PROMPTS]
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == whole


def test_samples_of_one_prompt_share_its_pages(engine, on_cpu) -> None:
    params = replace(LONG, temperature=1.0, n=4, seed=11)
    found, expected = (e.generate(PROMPTS[2:], params) for e in (engine, on_cpu))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_a_row_of_nan_ends_its_request_and_no_other(engine, model) -> None:
    preemptions = engine.loop.scheduler.num_preemptions
    kept = engine.stream(PROMPTS[1], LONG)
    tokens = _take(kept, 3)
    broken = engine.stream(PROMPTS[2], LONG)
    seen = _take(broken, 3)
    (seq,) = (s for s in engine.loop.scheduler.running if s.tokens[:21] == PROMPTS[2])
    page = int(engine.pool.block_tables([seq.id])[0, 0])
    for cache in engine.executor.caches.tensors.values():
        cache[page] = torch.nan
    with pytest.raises(VerificationError, match="finite"):
        for delta in broken:
            seen += delta.token_ids
    assert seen == greedy(model, PROMPTS[2], 24)[: len(seen)]
    tokens += [token for delta in kept for token in delta.token_ids]
    assert tokens == greedy(model, PROMPTS[1], 24)
    assert engine.loop.scheduler.num_preemptions == preemptions  # it did not start anew
    engine.reset_prefix_cache()  # it had the page that was overwritten
    found = [c.token_ids for c in engine.generate(PROMPTS, LONG)]
    assert found == [greedy(model, prompt, 24) for prompt in PROMPTS]


class Signs:
    """Token t is the character of code 0x4E00 + t."""

    def stream(self):
        return self

    def push(self, token_id: int) -> str:
        return chr(0x4E00 + token_id)

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("at", [1, 2, 9])
def test_stop_strings_end_a_sequence_of_many(at, engine, model) -> None:
    signs = Signs()
    loop = GenerationLoop(
        *(engine.executor, engine.pool, engine.loop.scheduler, engine.loop.sampler),
        *(signs, (), engine.config.max_model_len, VOCAB),
    )
    full = greedy(model, PROMPTS[0], 24)
    stop = "".join(map(signs.push, full[at : at + 2]))
    text = "".join(map(signs.push, full))
    cut = text.index(stop)
    each = [replace(LONG, stop=stop), LONG]
    (one,), (other,) = loop.generate([PROMPTS[0], PROMPTS[1]], each)
    assert one.text == text[:cut] and one.finish_reason == "stop"
    assert one.token_ids == full[: cut + 2]
    assert other.token_ids == greedy(model, PROMPTS[1], 24)


def _take(stream, count: int) -> list[int]:
    """The tokens of the next deltas."""
    return [token for _ in range(count) for token in next(stream).token_ids]
