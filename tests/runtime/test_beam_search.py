"""Beam search against Hugging Face's, over pages, slots and a crowded pool."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fake_executor import PAGED, FakeExecutor
from tilewright.errors import CapacityError, UsageError, VerificationError
from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    SlotPool,
)
from tilewright.runtime.beam_search import BeamSearcher, Searches
from tilewright.runtime.beams import BeamSearchParams, Continuation, Search
from tiny_models import PROMPTS, VOCAB, tiny_model

MAX_LEN = 64
SLOTS = Capabilities(mixes=False, pages=False, shares=False, max_slots=6)
ENDS = tuple(range(3, VOCAB, 5))  # as many as it takes for some beams to end early


@cache
def model():
    return tiny_model("llama")


@cache
def _logits(tokens):
    with torch.inference_mode():
        return model()(torch.tensor([tokens])).logits[0, -1]


def logits_of(tokens):
    return _logits(tuple(tokens))


def hugging_face(prompt, eos, params):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_new_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens = row[len(prompt) :]
        end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens) - 1)
        found.append((tokens[: end + 1], score))
    return found


class Numbers:
    """Token t is its number and a space."""

    def stream(self):
        return self

    def push(self, token_id):
        return f"{token_id} "

    def finish(self):
        return "."


def searcher(num_pages=120, page_size=4, eos=ENDS, capabilities=PAGED, caching=False, **knobs):
    pool = PagedPool(num_pages, page_size, prefix_caching=caching)
    if not capabilities.pages:
        pool = SlotPool(capabilities.max_slots, MAX_LEN)
    loop = GenerationLoop(
        FakeExecutor(capabilities, logits=logits_of),
        pool,
        Scheduler(pool, capabilities, **knobs),
        Sampler(),
        None,
        eos,
        MAX_LEN,
        VOCAB,
    )
    return BeamSearcher(loop, eos, Numbers())


def search(prompts, params, **options):
    one = searcher(**options)
    found = one.search(prompts, params)
    pool = one._loop.pool
    pool.clear_cache()
    assert pool.num_free == pool.num_pages - pool.shares and pool.waste() == 0
    return found


def same(found, expected):
    assert [one.token_ids for one in found] == [tokens for tokens, _ in expected]
    assert [one.score for one in found] == pytest.approx([s for _, s in expected], abs=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("width", "penalty"), [(4, 1.0), (3, 0.0), (2, 2.5), (3, -1.0)])
def test_sequences_and_scores_are_hugging_faces(early_stopping, width, penalty):
    params = BeamSearchParams(width, 12, penalty, early_stopping)
    prompt = PROMPTS[0]
    (found,) = search([prompt], params)
    same(found, hugging_face(prompt, ENDS, params))
    assert penalty > 1 or any(one.finish_reason == "stop" for one in found)


def test_all_end_at_the_limit_without_an_end_token():
    params = BeamSearchParams(3, 7)
    (found,) = search([PROMPTS[1]], params, eos=())
    same(found, hugging_face(PROMPTS[1], (), params))
    assert {one.finish_reason for one in found} == {"length"}
    assert found[0].text == " ".join(map(str, found[0].token_ids)) + " ."


def test_one_beam_is_greedy():
    (((one,),), ((greedy,),)) = (
        search([PROMPTS[0]], BeamSearchParams(1, 9), eos=()),
        searcher(eos=())._loop.generate([PROMPTS[0]], SamplingParams(max_new_tokens=9)),
    )
    assert one.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 1, "num_pages": 300},
        {"page_size": 7, "max_tokens_per_step": 5},
        {"capabilities": SLOTS},
        {"max_num_seqs": 4, "caching": True},
        {"num_pages": 24},
    ],
)
def test_several_prompts_at_once_are_each_alone(options):
    params = BeamSearchParams(3, 9)
    prompts = [*PROMPTS, PROMPTS[1]]
    for prompt, found in zip(prompts, search(prompts, params, **options), strict=True):
        same(found, hugging_face(prompt, ENDS, params))
        ended = [one for one in found if one.finish_reason == "stop"]
        assert all(one.text.count(" ") == len(one.token_ids) - 1 for one in ended)


def test_beams_share_the_prompts_pages():
    one = searcher()
    one.search([PROMPTS[2]], BeamSearchParams(4, 6))
    counters = one._loop.counters
    assert counters.prefill_tokens == len(PROMPTS[2])
    assert counters.decode_tokens <= 4 * 5
    assert 0 < counters.copied_pages <= 4 * 5


def test_running_requests_give_way_and_go_on():
    one = searcher(num_pages=16, eos=())
    loop, params = one._loop, SamplingParams(max_new_tokens=20)
    alone = searcher(eos=())._loop.generate([PROMPTS[0]], params)[0][0].token_ids
    stream = loop.stream(PROMPTS[0], params)
    tokens = [token for _ in range(9) for token in next(stream).token_ids]
    beams = BeamSearchParams(4, 16)
    (found,) = one.search([PROMPTS[1]], beams)
    same(found, hugging_face(PROMPTS[1], (), beams))
    assert loop.scheduler.num_preemptions > 0
    assert tokens + [token for delta in stream for token in delta.token_ids] == alone
    assert loop.pool.num_free == 15


@pytest.mark.parametrize("options", [{}, {"capabilities": SLOTS}])
def test_other_requests_go_on_between_its_steps(options):
    one = searcher(eos=(), **options)
    loop, params = one._loop, SamplingParams(max_new_tokens=20)
    request = loop.submit(PROMPTS[0], params)
    beams = BeamSearchParams(3, 9)
    (found,) = one.search([PROMPTS[1]], beams)
    same(found, hugging_face(PROMPTS[1], (), beams))
    (seq,) = request.sequences
    assert loop.scheduler.num_preemptions == 0
    # A token for each of the beams', but for the first, which comes with the second.
    assert len(seq.tokens) == len(PROMPTS[0]) + 8
    while not request.finished:
        loop.step()
    alone = searcher(eos=())._loop.generate([PROMPTS[0]], params)[0][0]
    assert request.completions()[0].token_ids == alone.token_ids
    assert not loop._guests and not loop.scheduler.num_guests


def test_who_finds_no_place_beside_the_beams_waits_for_them():
    one = searcher(eos=(), capabilities=SLOTS)
    loop, params = one._loop, SamplingParams(max_new_tokens=20)
    request, beams = loop.submit(PROMPTS[0], params), BeamSearchParams(6, 9)
    (found,) = one.search([PROMPTS[1]], beams)
    same(found, hugging_face(PROMPTS[1], (), beams))
    assert loop.scheduler.waiting == request.sequences
    while not request.finished:
        loop.step()
    alone = searcher(eos=())._loop.generate([PROMPTS[0]], params)[0][0]
    assert request.completions()[0].token_ids == alone.token_ids


def test_an_error_of_the_beams_is_not_that_of_who_steps():
    one = searcher(eos=())
    loop = one._loop
    alone = searcher(eos=())._loop.generate([PROMPTS[0]])[0][0]
    loop.executor.logits = lambda tokens: (
        logits_of(tokens) * (torch.nan if tokens[: len(PROMPTS[1])] == PROMPTS[1] else 1.0)
    )
    beams = BeamSearchParams(3, 9)
    searches = Searches(one, beams, [one._new(0, PROMPTS[1], beams)])
    loop.invite(searches)
    assert loop.generate([PROMPTS[0]])[0][0].token_ids == alone.token_ids
    assert searches.done and isinstance(searches.error, VerificationError)
    assert loop.pool.num_free == loop.pool.num_pages - 1


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupt_frees_the_beams(step):
    one = searcher()
    one._loop.executor.fail_at = step
    with pytest.raises(KeyboardInterrupt):
        one.search([PROMPTS[0], PROMPTS[1]], BeamSearchParams(3, 9))
    assert one._loop.pool.num_free == 119


def test_what_cannot_be_searched_is_refused():
    one = searcher(num_pages=9, max_num_seqs=4)
    with pytest.raises(UsageError, match="beam_width: expected at most 4"):
        one.search([[1]], BeamSearchParams(5))
    with pytest.raises(UsageError, match="max_model_len"):
        searcher().search([[1], [1] * MAX_LEN], BeamSearchParams(2))
    with pytest.raises(CapacityError, match="a prompt of at most 32 tokens"):
        one.search([[1], [1] * 40], BeamSearchParams(2))
    assert one._loop.executor.num_steps == 0
    with pytest.raises(CapacityError, match="free pages"):
        one.search([[1] * 20], BeamSearchParams(4, 12))
    assert one._loop.pool.num_free == 8
    one._loop.executor.logits = lambda tokens: logits_of(tokens) * torch.nan
    with pytest.raises(VerificationError, match="finite"):
        one.search([[1]], BeamSearchParams(2))
    assert one._loop.pool.num_free == 8
    assert one.search([], BeamSearchParams()) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0),
        ("beam_width", True),
        ("max_new_tokens", 1.5),
        ("length_penalty", float("nan")),
        ("length_penalty", "1"),
        ("early_stopping", "always"),
        ("early_stopping", None),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(UsageError, match=f"BeamSearchParams.{field}"):
        BeamSearchParams(**{field: value})


@pytest.mark.quick
def test_an_end_outside_of_the_best_width_is_not_kept():
    params = BeamSearchParams(2, 9, early_stopping=True)
    one = Search(0, [1], 9, [-2])
    best = [Continuation(0, token, -score) for token, score in ((5, 1), (7, 2), (0, 3), (6, 4))]
    assert one.take(best, params, {0}) == best[:2]
    assert not one.finished and not one.done
    best = [Continuation(1, token, -score) for token, score in ((0, 2), (5, 3), (0, 4), (7, 5))]
    going = one.take(best, params, {0})
    assert [c.token for c in going] == [5, 7]
    assert one.finished == [(-1.0, [7, 0])] and one.outputs == [[7, 5], [7, 7]]
