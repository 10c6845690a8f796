"""Rows of a form in steps launched ahead: the tokens of step by step, though each waits for a mask.

The device of `fake_decode` does nothing before it is waited for.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_decode import LazyExecutor
from fake_executor import PAGED, VOCAB, FakeExecutor
from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig
from tilewright.runtime import (
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    StructuredOutputsParams,
)
from tilewright.runtime.beam_search import BeamSearcher
from tilewright.runtime.beams import BeamSearchParams
from tilewright.runtime.engine import score
from tilewright.runtime.grammar import Grammars, Matcher

MAX_LEN, EOS = 48, VOCAB - 1
FORMS = [
    r"[a-d]{3}(efgh|klm)+",
    r"(abcabcabc|u)[a-u]{4,9}t?",
    r"([a-m]b?){2,20}",
    r"a(bcdefghijk){1,2}",
]


@cache
def tokenizer() -> Tokenizer:
    """Letters, "abc", and an end."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens = [*map(chr, range(97, 97 + VOCAB - 2)), "abc", "<end>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, TokenizerConfig(eos_token_ids=(EOS,)))


def loop_of(executor, num_pages=200):
    pool = PagedPool(num_pages, 4)
    scheduler = Scheduler(pool, executor.capabilities, max_num_seqs=8)
    grammars = Grammars(tokenizer(), [EOS], VOCAB)
    return GenerationLoop(
        executor, pool, scheduler, Sampler(), tokenizer(), [EOS], MAX_LEN, VOCAB, grammars
    )


def lazy(num_pages=200):
    return loop_of(LazyExecutor(8, MAX_LEN), num_pages)


def stepwise():
    return loop_of(FakeExecutor(PAGED))


def of_form(index, **params):
    form = StructuredOutputsParams(regex=FORMS[index])
    return SamplingParams(structured_outputs=form, **{"max_new_tokens": 25, **params})


def facts(results):
    return [[(c.token_ids, c.text, c.finish_reason) for c in each] for each in results]


def check_idle(loop):
    assert not loop.scheduler.running and not loop.scheduler.waiting and loop._flight is None
    assert loop.pool.num_free == loop.pool.num_pages - 1


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 3), min_size=1, max_size=9),
        st.sampled_from([None, *range(len(FORMS))]),
        st.sampled_from([{}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 4}]),
        st.sampled_from([{}, {"min_new_tokens": 9}, {"ignore_eos": True}, {"n": 2}]),
        st.integers(1, 25),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=20)
@given(requests=requests, num_pages=st.integers(11, 40), seed=st.integers(0, 9))
def test_tokens_are_those_of_step_by_step(requests, num_pages, seed):
    prompts = [prompt for prompt, *_ in requests]
    each = []
    for _, index, random, more, count in requests:
        given = {**random, **more, "seed": seed, "max_new_tokens": count}
        given["min_new_tokens"] = min(given.get("min_new_tokens", 0), count)
        each.append(SamplingParams(**given) if index is None else of_form(index, **given))
    loop = lazy(num_pages)
    assert facts(loop.generate(prompts, each)) == facts(stepwise().generate(prompts, each))
    check_idle(loop)


def test_steps_are_ahead_of_the_host_and_runs_are_chunks():
    loop, alone = lazy(), stepwise()
    free = of_form(2, temperature=1.0, seed=1, max_new_tokens=20, ignore_eos=True)
    expected = alone.generate([[1, 2], [3]], free)
    assert facts(loop.generate([[1, 2], [3]], free)) == facts(expected)
    assert loop.executor.graphs.queue.ahead > 10
    forced = of_form(3)
    before = loop.counters.steps
    ((one,),) = loop.generate([[1, 2]], forced)
    assert re.fullmatch(FORMS[3], one.text) and one.finish_reason == "stop"
    assert loop.counters.steps - before < len(one.token_ids) / 2
    check_idle(loop)


def test_masks_are_made_while_the_device_has_not_begun(monkeypatch):
    loop, made = lazy(), []
    words = Matcher.words

    def watched(self, early=()):
        queue = loop.executor.graphs.queue
        made.append(queue.done < len(queue.work))
        return words(self, early)

    monkeypatch.setattr(Matcher, "words", watched)
    loop.generate([[1, 2]], of_form(2, seed=1, max_new_tokens=12, ignore_eos=True))
    assert made == [False] + [True] * 11  # all but that of the prompt


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("call", range(1, 14))
def test_an_interrupt_anywhere_leaves_the_others_their_tokens(call, late):
    params = of_form(2, temperature=1.0, seed=3, max_new_tokens=16, ignore_eos=True)
    (expected,) = facts(stepwise().generate([[1, 2]], params))[0]
    loop = lazy()
    stream = loop.stream([1, 2], params)
    tokens = [token for _ in range(3) for token in next(stream).token_ids]
    queue = loop.executor.graphs.queue
    queue.fail_at, queue.fail_late = queue.calls + call, late
    with pytest.raises(KeyboardInterrupt):
        loop.generate([[5]], of_form(1, seed=1, temperature=1.0))
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == expected[0]
    check_idle(loop)


def test_other_work_between_steps_leaves_the_tokens():
    params = of_form(2, temperature=1.0, seed=3, max_new_tokens=16, ignore_eos=True)
    (expected,) = facts(stepwise().generate([[1, 2]], params))[0]
    for settles in (True, False):
        loop = lazy()
        stream, tokens = loop.stream([1, 2], params), []
        for place, delta in enumerate(stream):
            tokens += delta.token_ids
            if place in (3, 6):
                with loop.lock:
                    if settles:
                        loop.settle()
                    score(loop.executor, loop.pool, torch.tensor([4, 5, 6]))
                    score(loop.executor, loop.pool, torch.tensor([4]))  # by the decode Program
        assert tokens == expected[0]
        # Without that the logits are gone, and the sequence starts anew from its tokens.
        assert (loop.scheduler.num_preemptions > 0) == (not settles)
        check_idle(loop)


def test_beams_between_steps_leave_the_tokens():
    params = of_form(2, temperature=1.0, seed=3, max_new_tokens=16, ignore_eos=True)
    (expected,) = facts(stepwise().generate([[1, 2]], params))[0]
    loop = lazy()
    stream = loop.stream([1, 2], params)
    tokens = [token for _ in range(4) for token in next(stream).token_ids]
    BeamSearcher(loop, [EOS], None).search([[7, 8]], BeamSearchParams(3, 6))
    assert tokens + [token for delta in stream for token in delta.token_ids] == expected[0]
    assert loop.scheduler.num_preemptions == 0
    check_idle(loop)


def test_a_dropped_stream_leaves_nothing():
    loop = lazy()
    stream = loop.stream([1, 2], of_form(2, max_new_tokens=16))
    for _ in range(4):
        next(stream)
    stream.close()
    check_idle(loop)
    params = of_form(2, max_new_tokens=9)
    assert facts(loop.generate([[4]], params)) == facts(stepwise().generate([[4]], params))
