"""Outputs of a form: what is refused, what may come next, and what comes through the loop."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from fake_executor import FakeExecutor
from tilewright.errors import UsageError, VerificationError
from tilewright.runtime import (
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    StructuredOutputsParams,
)
from tilewright.runtime.grammar import Grammars, Matcher, banned, prepare
from tilewright.runtime.sampling import SamplingState
from writing_model import EOS, MAX_LEN, MIXES, SLOTS, VOCAB, logits_of, tokenizer, writing_loop

PROMPT = [40, 41, 42]
SCHEMA = {
    "type": "object",
    "properties": {"the quick brown": {"type": "integer", "maximum": 99}, "fox": {"enum": ["a"]}},
    "required": ["the quick brown", "fox"],
    "additionalProperties": False,
}
TIGHT = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
FORMS = {
    "json": TIGHT,
    "regex": StructuredOutputsParams(regex=r"[a-c]{2,5}: (the quick|the lazy) [0-9]+ dogs"),
    "choice": StructuredOutputsParams(choice=["jumps over", "jumps", 'a "quoted"\n', "größe"]),
    "lark": StructuredOutputsParams(grammar='start: sum\nsum: N ("+" N)*\nN: /[0-9]{1,3}/'),
    "gbnf": StructuredOutputsParams(grammar='root ::= "over " ("dog" | "fox")+ "."'),
    "json_object": StructuredOutputsParams(json_object=True, whitespace_pattern=" ?"),
}


def of_form(form, **params):
    return SamplingParams(structured_outputs=form, **{"max_new_tokens": 200, **params})


def matcher(form, **options) -> Matcher:
    return Grammars(tokenizer(), EOS, VOCAB).matcher(form, **options)


def allowed(one, early=()):
    mask = banned(one.words(early)[None], VOCAB, torch.device("cpu"))[0]
    return {int(token) for token in (~mask).nonzero()}


def fits(name, text):
    if name == "json":
        value = json.loads(text)
        return set(value) == {"the quick brown", "fox"} and value["fox"] == "a"
    if name == "json_object":
        return isinstance(json.loads(text), dict)
    if name == "choice":
        return text in FORMS["choice"].choice
    patterns = {
        "regex": FORMS["regex"].regex,
        "lark": r"[0-9]{1,3}(\+[0-9]{1,3})*",
        "gbnf": r"over (dog|fox)+\.",
    }
    return re.fullmatch(patterns[name], text) is not None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({}, "StructuredOutputsParams"),
        ({"regex": "a", "choice": ["a"]}, "StructuredOutputsParams"),
        ({"json": 5}, "StructuredOutputsParams.json"),
        ({"json": "{"}, "StructuredOutputsParams.json"),
        ({"json": {"enum": [{1}]}}, "StructuredOutputsParams.json"),
        ({"json": {"const": float("nan")}}, "StructuredOutputsParams.json"),
        ({"regex": 5}, "StructuredOutputsParams.regex"),
        ({"grammar": ["start"]}, "StructuredOutputsParams.grammar"),
        ({"choice": []}, "StructuredOutputsParams.choice"),
        ({"choice": "ab"}, "StructuredOutputsParams.choice"),
        ({"choice": [1]}, "StructuredOutputsParams.choice"),
        ({"json_object": 1}, "StructuredOutputsParams.json_object"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern"),
    ],
)
def test_what_is_no_form_is_refused(fields, culprit):
    with pytest.raises(UsageError, match=re.escape(culprit)):
        StructuredOutputsParams(**fields)


@pytest.mark.quick
def test_forms_are_equal_by_what_they_say():
    schema = {"type": "null"}
    same = StructuredOutputsParams(json=json.dumps(schema))
    assert StructuredOutputsParams(json=schema) == same and len({same, same}) == 1
    with pytest.raises(UsageError, match=r"SamplingParams\.structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})
    with pytest.raises(UsageError, match=r"SamplingParams\.allowed_token_ids"):
        of_form(same, allowed_token_ids=[1])


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": "start: start"}, "no text can follow"),
        ({"grammar": "root ::= ("}, "line 1"),
        ({"json": {"type": "colour"}}, "Invalid type: colour"),
        ({"json": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable"),
        ({"json": "[1]"}, "object schema"),
        ({"json_object": True, "whitespace_pattern": "("}, "unclosed group"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_refused_before_anything_runs(fields, found):
    loop, form = writing_loop(), StructuredOutputsParams(**fields)
    for call in (
        lambda: loop.generate([PROMPT, PROMPT], [SamplingParams(), of_form(form)]),
        lambda: loop.stream(PROMPT, of_form(form)),
    ):
        with pytest.raises(UsageError, match=re.escape(found)) as error:
            call()
        assert error.value.culprit == f"StructuredOutputsParams.{form.kind}"
        assert error.value.remedy and len(error.value.found) < 350
    assert loop.executor.num_steps == 0 and not loop.scheduler.waiting


def test_without_a_tokenizer_there_is_no_form():
    pool = PagedPool(10, 8)
    loop = GenerationLoop(
        FakeExecutor(), pool, Scheduler(pool, MIXES), Sampler(), None, EOS, MAX_LEN, VOCAB
    )
    with pytest.raises(UsageError, match="structured_outputs: expected a tokenizer"):
        loop.generate([PROMPT], of_form(TIGHT))


def test_the_mask_is_what_may_follow_and_the_end_where_the_form_is_complete():
    one = matcher(StructuredOutputsParams(regex="ab+"))
    a, b, fox = (tokenizer().encode(text)[0] for text in ("a", "b", "fox"))
    assert allowed(one) == {a} and one.forced == a and not one.stopped
    one.advance(a)
    assert allowed(one) == {b} and one.forced == b
    one.advance(b)
    assert allowed(one) == {b, *EOS} and one.forced is None
    assert allowed(one, early=[*EOS, 10**6]) == {b}
    assert allowed(one, early=[b, *EOS]) == {b, *EOS}  # there are no others
    one.advance(EOS[1])
    assert one.stopped and one.error() is None
    one = matcher(StructuredOutputsParams(regex="ab+"))
    one.advance(fox)
    assert one.stopped and "the grammar" in str(one.error())


def test_an_end_that_is_to_be_ignored_comes_only_where_nothing_else_can():
    one = matcher(StructuredOutputsParams(regex="a+"), ignore_eos=True)
    a = tokenizer().encode("a")[0]
    one.advance(a)
    assert not allowed(one) & set(EOS)
    empty = matcher(StructuredOutputsParams(choice=[""]), ignore_eos=True)
    assert allowed(empty) == set(EOS)


def test_matchers_of_one_form_go_their_own_ways():
    grammars = Grammars(tokenizer(), EOS, VOCAB)
    one, other = (grammars.matcher(TIGHT) for _ in range(2))
    before = allowed(other)
    one.advance(min(before))
    assert allowed(one) != before
    assert allowed(other) == before


def test_masks_of_many_are_those_of_each():
    forms = list(FORMS.values())
    together, alone = [[matcher(form) for form in forms] for _ in range(2)]
    prepare(together)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.words(), other.words())


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 128])
def test_bits_are_tokens(vocab):
    tokens = {0, 5, 31, 32, 63, 64, 96, 127}
    words = np.zeros((2, 4), dtype=np.int32)
    for token in tokens:
        words[1].view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    mask = ~banned(words, vocab, torch.device("cpu"))
    assert mask.shape == (2, vocab) and not mask[0].any()
    assert {int(token) for token in mask[1].nonzero()} == {t for t in tokens if t < vocab}


@pytest.mark.parametrize("vocab", [200, VOCAB, 1000])
def test_a_free_row_keeps_all_its_tokens_and_a_held_one_those_that_its_form_knows(vocab):
    logits = torch.zeros(2, vocab)
    logits[:, -1] = 5.0
    held = SamplingState(of_form(TIGHT), PROMPT, frozenset(EOS), 0, matcher(TIGHT))
    free = SamplingState(SamplingParams(), PROMPT, frozenset())
    brace = tokenizer().encode("{")[0]
    assert [s.token_id for s in Sampler().sample(logits, [held, free])] == [brace, vocab - 1]


def test_rows_without_a_form_keep_their_logits():
    grammars = Grammars(tokenizer(), EOS, VOCAB)
    held = SamplingState(of_form(TIGHT), PROMPT, frozenset(EOS), 0, grammars.matcher(TIGHT))
    assert not held.plain and not held.samples_in_step
    logits = torch.zeros(3, VOCAB)
    logits[:, 200] = 5.0
    free = SamplingState(SamplingParams(), PROMPT, frozenset())
    brace = tokenizer().encode("{")[0]
    found = Sampler().sample(logits, [free, held, free])
    assert [one.token_id for one in found] == [200, brace, 200]
    assert float(logits.min()) == 0  # as they were
    biased = of_form(TIGHT, logit_bias={200: 100.0}, repetition_penalty=1.3, min_new_tokens=9)
    held = SamplingState(biased, PROMPT, frozenset(EOS), 0, grammars.matcher(TIGHT))
    assert Sampler().sample(logits[:1], [held])[0].token_id == brace


@pytest.mark.parametrize("name", FORMS)
def test_what_comes_has_the_form(name):
    params = of_form(FORMS[name], temperature=1.0, seed=4, n=3)
    greedy = of_form(FORMS[name])
    loop = writing_loop()
    completions = [c for cs in loop.generate([PROMPT, PROMPT], [params, greedy]) for c in cs]
    for one in completions:
        assert one.finish_reason == "stop"
        assert fits(name, one.text), one.text
        assert len(one.token_ids) == one.usage.completion_tokens


def completions(loop, params, prompts=(PROMPT, [7] * 30, [9])):
    found = loop.generate(list(prompts), params)
    assert not loop.scheduler.running and not loop.scheduler.waiting
    return [(c.token_ids, c.text, c.finish_reason) for cs in found for c in cs]


@pytest.mark.parametrize("name", ["json", "regex", "lark"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_how_they_are_computed(name, temperature):
    params = of_form(FORMS[name], temperature=temperature, seed=3, n=2)
    loop = writing_loop()
    expected = completions(loop, params)
    assert completions(writing_loop(SLOTS), params) == expected
    assert completions(writing_loop(max_tokens_per_step=5), params) == expected
    tight = writing_loop(num_pages=8)
    assert completions(tight, params) == expected
    assert name == "lark" or tight.scheduler.num_preemptions > 0
    slow = writing_loop()
    with_logprobs = of_form(FORMS[name], temperature=temperature, seed=3, n=2, logprobs=0)
    assert completions(slow, with_logprobs) == expected
    # Forced tokens took no steps of their own.
    assert name == "lark" or loop.counters.steps < slow.counters.steps


def test_logprobs_are_the_models_own():
    (one,) = writing_loop().generate([PROMPT], of_form(TIGHT, logprobs=1))[0]
    assert [p.token_id for p in one.logprobs] == one.token_ids
    for index, found in enumerate(one.logprobs):
        exact = logits_of(PROMPT + one.token_ids[:index]).double().log_softmax(-1)
        assert found.logprob == pytest.approx(float(exact[found.token_id]), abs=1e-6)


def test_forced_tokens_are_decoded_in_fewer_steps():
    loop = writing_loop()
    (one,) = loop.generate([PROMPT], of_form(TIGHT))[0]
    counters, count = loop.counters, len(one.token_ids)
    assert (counters.prefill_tokens, counters.recomputed_tokens) == (len(PROMPT), 0)
    assert 0 < counters.decode_tokens == counters.tokens_computed - len(PROMPT) < count
    assert counters.steps < count - 5  # what is forced at the end is not computed at all


def test_a_stream_gives_forced_tokens_one_by_one():
    params = of_form(TIGHT, temperature=1.0, seed=1)
    deltas = list(writing_loop().stream(PROMPT, params))
    (whole,) = writing_loop().generate([PROMPT], params)[0]
    assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
    assert all(len(delta.token_ids) == 1 for delta in deltas)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert len(whole.timings.itl) == len(whole.token_ids) - 1


def test_the_limit_and_stop_strings_hold_among_forced_tokens():
    (whole,) = writing_loop().generate([PROMPT], of_form(TIGHT))[0]
    for count in range(1, len(whole.token_ids)):
        (cut,) = writing_loop().generate([PROMPT], of_form(TIGHT, max_new_tokens=count))[0]
        assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:count], "length")
    (exact,) = writing_loop().generate(
        [PROMPT], of_form(TIGHT, max_new_tokens=len(whole.token_ids))
    )[0]
    assert (exact.text, exact.finish_reason) == (whole.text, "stop")
    (cut,) = writing_loop().generate([PROMPT], of_form(TIGHT, stop="ick"))[0]
    assert (cut.text, cut.finish_reason) == ('{"the qu', "stop")


def test_a_form_outlasts_its_end_only_where_it_can():
    pattern = StructuredOutputsParams(regex="[a-z]{1,40}")
    loop = writing_loop()
    (late,) = loop.generate([PROMPT], of_form(pattern, min_new_tokens=9, max_new_tokens=9))[0]
    assert len(late.token_ids) == 9 and not set(late.token_ids) & set(EOS)
    (on,) = loop.generate([PROMPT], of_form(pattern, ignore_eos=True))[0]
    assert len(on.text) == 40 and on.finish_reason == "stop"
    (short,) = loop.generate([PROMPT], of_form(FORMS["choice"], min_new_tokens=150))[0]
    assert short.text in FORMS["choice"].choice  # though it has fewer tokens


def test_what_fails_on_the_way_fails_its_own_request_alone(monkeypatch):
    loop, fails = writing_loop(), of_form(FORMS["regex"], n=1)
    wrong = VerificationError("form", expected="a", found="b", remedy="c")
    other = loop.stream(PROMPT, SamplingParams(max_new_tokens=12))
    tokens = list(next(other).token_ids)
    with monkeypatch.context() as patch:
        patch.setattr(Matcher, "error", lambda self: wrong)
        patch.setattr(Matcher, "stopped", property(lambda self: True))
        with pytest.raises(VerificationError, match="form"):
            loop.generate([PROMPT], fails)
        with pytest.raises(VerificationError, match="form"):
            next(loop.stream(PROMPT, fails))  # before a delta could say that all is well
    tokens += [token for delta in other for token in delta.token_ids]
    assert len(tokens) == 12 or tokens[-1] in EOS
    assert loop.pool.num_free == loop.pool.num_pages - 1


@pytest.mark.parametrize("step", [1, 2, 5])
def test_an_interrupt_leaves_the_others_their_form(step):
    params = of_form(TIGHT, temperature=1.0, seed=8)
    (whole,) = writing_loop().generate([PROMPT], params)[0]
    loop = writing_loop()
    stream = loop.stream(PROMPT, params)
    tokens = list(next(stream).token_ids)
    loop.executor.fail_at = loop.executor.num_steps + step
    with pytest.raises(KeyboardInterrupt):
        loop.generate([[4, 5], [6]], of_form(FORMS["regex"], n=2))
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == whole.token_ids
    assert loop.pool.num_free == loop.pool.num_pages - 1


def test_masks_are_there_before_the_logits_are_read(monkeypatch):
    """On a GPU the logits come late: what has not been prepared then would wait for them."""
    loop, late = writing_loop(), []
    sample = Sampler.sample

    def watched(self, logits, states):
        late.extend(s for s in states if s.matcher is not None and s.matcher._words is None)
        return sample(self, logits, states)

    monkeypatch.setattr(Sampler, "sample", watched)
    loop.generate([PROMPT, PROMPT], of_form(TIGHT, n=2))
    assert not late
