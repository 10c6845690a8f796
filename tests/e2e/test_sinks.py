"""Endless sequences: a tiny Llama with a window and sinks, against StreamingLLM written out in
float64, in constant memory, however its steps are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tilewright as tw
from tilewright.compiler.inspect.facts import headline
from tilewright.errors import CapacityError, UnsupportedError, UsageError
from tilewright.runtime import GenerationLoop, Sampler, SamplingParams, Scheduler
from tilewright.runtime.engine import CausalLMEngine
from tilewright.runtime.sliding import ENDLESS, Sliding
from tilewright.runtime.sliding_pool import SlidingPool
from tiny_models import VOCAB, tiny_model

WINDOW, SINKS, PAGE = 16, 2, 8
CONFIG = tw.KVCacheConfig(page_size=PAGE, window=WINDOW, sinks=SINKS)
PROMPT = [5, 9, 3]


def greedy(count: int, **params) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **params)


@pytest.fixture(scope="module")
def engine() -> CausalLMEngine:
    return tw.compile(
        tiny_model("llama"), backend="eager", target="cpu", kv_cache=CONFIG, max_batch_size=3
    )


@pytest.fixture(scope="module")
def stream(engine) -> list[int]:
    """A prompt and what the engine says behind it, token by token."""
    (found,) = engine.generate([PROMPT], greedy(150))
    return PROMPT + found.token_ids


def streamed(ids: list[int]) -> torch.Tensor:
    """Logits f64[S, V] as StreamingLLM computes them: the keys of a cache of sinks and window stand
    in it as they came from their projection, and all are rotated by their places in the cache.
    """
    model = tiny_model("llama").double()
    config, base = model.config, model.model
    heads, width = config.num_attention_heads, base.layers[0].self_attn.head_dim
    angles = torch.arange(WINDOW + SINKS)[:, None] * base.rotary_emb.inv_freq.double()
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def turned(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[places] + torch.cat([-b, a], -1) * sin[places]

    x = base.embed_tokens(torch.tensor(ids))
    for layer in base.layers:
        attention, n = layer.self_attn, layer.input_layernorm(x)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(n).unflatten(-1, (-1, width)).transpose(0, 1) for p in parts)
        k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
        rows = []
        for p in range(len(ids)):
            kept = [*range(min(SINKS, p + 1)), *range(max(SINKS, p - WINDOW + 1), p + 1)]
            places = torch.arange(len(kept))
            scores = turned(q[:, p : p + 1], places[-1:]) @ turned(k[:, kept], places).mT
            rows.append(((scores * width**-0.5).softmax(-1) @ v[:, kept]).flatten())
        x = x + attention.o_proj(torch.stack(rows))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(base.norm(x))


@torch.no_grad()
def test_it_is_streaming_llm_token_for_token(engine, stream):
    wanted = streamed(stream)
    assert wanted[len(PROMPT) - 1 : -1].argmax(-1).tolist() == stream[len(PROMPT) :]
    torch.testing.assert_close(engine(torch.tensor(stream)).double(), wanted, rtol=1e-3, atol=1e-3)
    whole = tiny_model("llama")(torch.tensor([stream])).logits[0]
    assert (whole[-1].double() - wanted[-1]).abs().max() > 0.1  # the window matters


@contextmanager
def loop_of(engine, pages: int, budget: int = 2048, chunk: int = 256) -> Iterator[GenerationLoop]:
    """A loop over the engine's executor with a pool of its own."""
    executor = engine.executor
    sliding = Sliding(PAGE, WINDOW, SINKS, chunk)
    pool = SlidingPool(pages, sliding, prefix_caching=True)
    scheduler = Scheduler(pool, executor.capabilities, max_tokens_per_step=budget)
    yield GenerationLoop(executor, pool, scheduler, Sampler(), None, (), ENDLESS, VOCAB)
    assert pool.num_available == pages - 1 and pool.waste() == 0
    executor.allocate(engine.pool.num_pages, PAGE)
    engine.reset_prefix_cache()


@pytest.mark.parametrize("chunk", [5, 8, 64])
def test_chunks_of_a_prompt_change_nothing(engine, stream, chunk):
    with loop_of(engine, 40, budget=chunk, chunk=chunk) as loop:
        ((found,),) = loop.generate([stream[:120]], greedy(20, prompt_logprobs=0))
    assert found.token_ids == stream[120:140]
    logprobs = engine(torch.tensor(stream[:120])).double().log_softmax(-1)
    own = logprobs[range(119), stream[1:120]].tolist()
    assert [one.logprob for one in found.prompt_logprobs[1:]] == pytest.approx(own, abs=1e-4)


def test_what_is_preempted_comes_back_from_its_tokens(engine, stream):
    most = Sliding(PAGE, WINDOW, SINKS, 8).most_pages
    with loop_of(engine, most + 4, budget=12, chunk=8) as loop:
        prompts = [stream[:3], stream[:4], stream[:9], stream[:60]]
        found = loop.generate(prompts, greedy(50))
        assert loop.scheduler.num_preemptions > 0 and loop.pool.num_dropped > 9
    for prompt, (one,) in zip(prompts, found, strict=True):
        assert one.token_ids == stream[len(prompt) : len(prompt) + 50]


def test_a_prompt_longer_than_the_window_is_found_again(engine, stream):
    with loop_of(engine, 60, chunk=16) as loop:
        first, again = (loop.generate([stream[:100]], greedy(20))[0][0] for _ in range(2))
        held = loop.pool.num_free
        forked = loop.generate([stream[:70]], greedy(40, n=3))[0]
    assert first.usage.cached_tokens == 0 and again.usage.cached_tokens == 99
    assert first.token_ids == again.token_ids == stream[100:120]
    assert held < 59  # the tree has them
    assert forked[0].usage.cached_tokens == 69
    assert all(one.token_ids == stream[70:110] for one in forked)


def test_beams_slide_too(engine, stream):
    ((best, *_),) = engine.beam_search([stream[:40]], beam_width=1, max_new_tokens=40)
    assert best.token_ids == stream[40:80]


def test_memory_is_constant(engine):
    sliding = engine.config.sliding
    assert engine.pool.num_pages == 3 * sliding.most_pages + 1
    with loop_of(engine, sliding.most_pages + 1) as loop:
        request = loop.submit(PROMPT * 200, greedy(60))
        fewest, widest = loop.pool.num_available, 0
        while not request.finished:
            loop.step()
            fewest = min(fewest, loop.pool.num_available)
            widest = max(widest, *map(len, loop.pool._held.values()), 0)
    assert fewest >= 0 and widest <= sliding.most_pages
    assert request.completions()[0].usage.prompt_tokens == 600 > engine.config.max_model_len


def test_an_engine_folder_keeps_it(engine, stream, tmp_path: Path):
    engine.save(tmp_path / "engine")
    loaded = tw.load(tmp_path / "engine")
    assert (loaded.config.window, loaded.config.sinks) == (WINDOW, SINKS)
    assert loaded.generate([stream[:50]], greedy(9))[0].token_ids == stream[50:59]


@pytest.mark.parametrize(
    "options, error, found",
    [
        ({"backend": "onnxruntime"}, UnsupportedError, "slots"),
        ({"backend": "triton", "deterministic": True}, UnsupportedError, "deterministic"),
        ({"backend": "eager", "max_model_len": 17}, UsageError, "at most 17 tokens together"),
    ],
)
def test_what_cannot_slide_is_refused(options, error, found):
    with pytest.raises(error, match=found):
        tw.compile(tiny_model("llama"), target="cpu", kv_cache=CONFIG, **options)


@pytest.mark.parametrize("wrong", [{"window": 15}, {"window": True}, {"sinks": -1}])
def test_wrong_options(wrong):
    with pytest.raises(UsageError, match=f"KVCacheConfig.{next(iter(wrong))}"):
        tw.KVCacheConfig(**wrong)


def test_learned_positions_are_refused():
    with pytest.raises(UnsupportedError, match="of which each position takes a row"):
        tw.compile(tiny_model("gpt2"), target="cpu", backend="eager", kv_cache=CONFIG)


def test_a_pool_too_small_for_one_window_takes_what_fits():
    pool = SlidingPool(4, Sliding(PAGE, WINDOW, SINKS, 8))
    assert pool.max_tokens == 3 * PAGE
    pool.add(1)
    for _ in range(3):
        pool.append(1, 8)
    with pytest.raises(CapacityError):
        pool.append(1, 8)


def test_facts_say_what_is_seen(engine):
    facts = dict(headline(engine.image))
    assert facts["context"].startswith("the latest 16 tokens and the first 2 ")
