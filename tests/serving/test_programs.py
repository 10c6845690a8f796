"""Programs on an engine: what they say is what the engine alone says to the same prompts."""

from __future__ import annotations

import json
import signal
import threading

import pytest
import torch

import tilewright as tw
from tilewright.errors import UsageError
from tilewright.serving.programs import ProgramTimeout
from tiny_gguf import tiny_hf_model

PAGE = 16
WARM = {"temperature": 1.0, "max_new_tokens": 5}  # a tiny greedy model repeats itself
LONG = "the quick brown fox jumps over the lazy dog and runs away"


@tw.program
def essay(s, topic, branches=3):
    s += tw.system(LONG)
    s += tw.user("the " + topic)
    s += tw.assistant(
        "fox ", tw.gen("first", seed=1, **WARM), " dog ", tw.gen("second", seed=2, **WARM)
    )
    forked = s.fork(branches)
    for index, b in enumerate(forked):
        b += tw.user(f"and {index}")
        b += tw.assistant(tw.gen("text", seed=3 + index, **WARM))
        b += tw.user("more")
        b += tw.assistant(tw.gen("more", seed=9, **WARM))
    s.join(forked)
    s += tw.user(" or ".join(s["text"]))
    s += tw.assistant(tw.select("best", ["fox", "lazy dog"]))
    return forked


class Steps:
    """How many sequences there were in the largest step."""

    def __init__(self) -> None:
        self.most = 0

    def added(self, request) -> None: ...

    def stepped(self, chunks, started, ended) -> None:
        self.most = max(self.most, len(chunks))


@pytest.fixture
def steps(engine):
    observer = Steps()
    engine.loop.observers.append(observer)
    yield observer
    engine.loop.observers.remove(observer)


@pytest.fixture(autouse=True)
def _nothing_is_left(engine):
    """No test leaves a sequence or a page that one holds."""
    engine.reset_prefix_cache()
    free = engine.pool.num_free
    yield
    assert not engine.loop.scheduler.running and not engine.loop.scheduler.waiting
    engine.reset_prefix_cache()
    assert engine.pool.num_free == free
    assert not [t for t in threading.enumerate() if t.name.startswith("tilewright-program")]


def alone(engine, messages, begun="", **params):
    """The engine's own answer."""
    ids = engine.chat_prompt(messages)
    if begun:
        text = engine.tokenizer.apply_chat_template(messages) + begun
        ids = engine.tokenizer.encode(text, add_special_tokens=False)
    return engine.generate([ids], tw.SamplingParams(**params))[0].text


def test_each_answer_is_the_engines_to_the_same_messages(engine, steps) -> None:
    result = essay.run(engine, topic="brown fox")
    system, user, answer, question, last = result.messages()
    assert [one["role"] for one in result.messages()] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    first = alone(engine, [system, user], "fox ", seed=1, **WARM)
    second = alone(engine, [system, user], f"fox {first} dog ", seed=2, **WARM)
    assert answer["content"] == f"fox {first} dog {second}"
    assert (result["first"], result["second"]) == (first, second)
    for index in range(3):
        asked = [system, user, answer, {"role": "user", "content": f"and {index}"}]
        text = alone(engine, asked, seed=3 + index, **WARM)
        assert result["text"][index] == text
        asked += [{"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
        assert result["more"][index] == alone(engine, asked, seed=9, **WARM)
    assert question["content"] == " or ".join(result["text"])
    assert last["content"] == result["best"] in ("fox", "lazy dog")
    assert len({*result["text"]}) == 3  # or there would be little to compare
    assert steps.most >= 3


def test_branches_share_what_comes_before_them(engine) -> None:
    @tw.program
    def forks(s):
        s += tw.system(LONG + " " + LONG)
        branches = s.fork(3)
        for b in branches:
            b += tw.user("dog")
            b += tw.assistant(tw.gen("text", max_new_tokens=2))
        s.join(branches)

    result = forks.run(engine)
    prefix = engine.tokenizer.apply_chat_template(
        [{"role": "system", "content": LONG + " " + LONG}], add_generation_prompt=False
    )
    shared = len(engine.tokenizer.encode(prefix, add_special_tokens=False))
    used = [outcome.usage for outcome in result.outcomes["text"]]
    full = shared // PAGE * PAGE  # the tree has full pages
    assert full >= 2 * PAGE and all(one.cached_tokens >= full for one in used)
    assert result.usage.cached_tokens == sum(one.cached_tokens for one in used)
    assert result.usage.prompt_tokens == shared + sum(one.prompt_tokens for one in used)
    assert result.usage.completion_tokens == 6


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("the quick ", ["brown", "fox jumps over", "dog"]),
        ("the quick bro", ["wn fox", "om", "wn"]),  # "brown" is one token
    ],
)
def test_select_takes_the_highest_mean_logprob(engine, text, options) -> None:
    @tw.program
    def choice(s):
        s += text
        s += tw.select("best", options)

    model, encode = tiny_hf_model().double(), engine.tokenizer.encode
    rows = {option: encode(text + option) for option in options}
    start = next(
        i for i, t in enumerate(encode(text) + [-1]) if any(ids[i] != t for ids in rows.values())
    )
    expected = {}
    for option, ids in rows.items():
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = [float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))]
        expected[option] = sum(scores) / len(scores)
    result = choice.run(engine)
    assert result.outcomes["best"].scores == pytest.approx(expected, abs=1e-4)
    assert result["best"] == max(expected, key=expected.get)
    assert result.text() == text + result["best"]


def test_outputs_have_their_forms(engine) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }

    @tw.program
    def forms(s):
        s += "the "
        s += tw.gen("json", json_schema=schema, max_new_tokens=80, temperature=1, seed=1)
        s += tw.gen("regex", regex="[a-c]{3}")
        s += tw.gen("choice", choices=["fox", "dog"])
        s += tw.gen("grammar", grammar='start: "x" | "yz"')

    result = forms.run(engine)
    assert json.loads(result["json"])["n"] in (1, 2)
    assert len(result["regex"]) == 3 and set(result["regex"]) <= set("abc")
    assert result["choice"] in ("fox", "dog") and result["grammar"] in ("x", "yz")
    assert result.text() == "the " + "".join(result.variables.values())
    assert result.messages() == []


def test_forks_nest_and_branches_may_differ(engine) -> None:
    @tw.program
    def nested(s):
        outer = s.fork(2)
        for b in outer:
            b += "the quick"
            inner = b.fork(2)
            for place, leaf in enumerate(inner):
                leaf += tw.gen("leaf", max_new_tokens=1, seed=place, temperature=1)
            b.join(inner)
        outer[1] += tw.gen("extra", max_new_tokens=1)
        s.join(outer)
        assert s["extra"][0] is None and "leaf" in s
        s += "a dog"

    result = nested.run(engine)
    expected = [
        engine.generate("the quick", tw.SamplingParams(max_new_tokens=1, seed=n, temperature=1))[0]
        for n in range(2)
    ]
    assert result["leaf"] == [[one.text for one in expected]] * 2
    assert isinstance(result["extra"][1], str) and result.text() == "a dog"


def test_a_program_is_part_of_another(engine) -> None:
    @tw.program
    def part(s, name):
        s += tw.gen(name, max_new_tokens=2)
        return s[name]

    @tw.program
    def whole(s):
        s += "the quick"
        return part(s, name="one"), part(s, name="two")

    result = whole.run(engine)
    assert result.value == (result["one"], result["two"])


def test_a_stream_adds_up_to_the_result(engine) -> None:
    stream = essay.stream(engine, topic="brown fox")
    texts: dict[object, str] = {}
    for piece in stream:
        key = (piece.name, *piece.branch)
        texts[key] = texts.get(key, "") + piece.text
    result = stream.result
    assert result.variables == essay.run(engine, topic="brown fox").variables
    assert texts[("first",)] == result["first"] and texts[("best",)] == result["best"]
    assert [texts[("more", index)] for index in range(3)] == result["more"]


def test_a_batch_gives_what_single_runs_give(engine, steps) -> None:
    many = [{"topic": "fox", "branches": 2}, {"topic": "dog", "branches": 2}]
    results = essay.run_batch(engine, many)
    assert steps.most > 2
    singles = [essay.run(engine, **one) for one in many]
    assert [one.variables for one in results] == [one.variables for one in singles]
    assert essay.run_batch(engine, []) == []


def test_runs_on_one_engine_share_its_steps(engine) -> None:
    @tw.program
    def inner(s):
        s += "the lazy"
        s += tw.gen("dog", max_new_tokens=3)
        return sum(thread.name == "tilewright-steps" for thread in threading.enumerate())

    @tw.program
    def outer(s):
        s += "the quick"
        s += tw.gen("fox", max_new_tokens=8, ignore_eos=True)
        return inner.run(engine)

    found = outer.run(engine).value
    assert found["dog"] == engine.generate("the lazy", tw.SamplingParams(max_new_tokens=3))[0].text
    assert found.value == 1


def _endless(s, name="long"):
    s += "the quick"
    s += tw.gen(name, max_new_tokens=200, ignore_eos=True)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_gives_its_requests_up(engine, error) -> None:
    @tw.program
    def failing(s):
        for branch in s.fork(2):
            _endless(branch)
        _endless(s, "own")
        raise error

    with pytest.raises(type(error)):
        failing.run(engine)


def test_ctrl_c_while_it_waits_gives_its_requests_up(engine, monkeypatch) -> None:
    main = threading.main_thread().ident
    sent = []

    def stepped(self, chunks, started, ended) -> None:
        if not sent:
            sent.append(signal.pthread_kill(main, signal.SIGINT))

    monkeypatch.setattr(Steps, "stepped", stepped)
    engine.loop.observers.append(Steps())
    try:
        with pytest.raises(KeyboardInterrupt):
            tw.program(_endless).run(engine)
    finally:
        engine.loop.observers.pop()
    assert sent


def test_a_timeout_gives_its_requests_up(engine) -> None:
    slow = tw.program(_endless)
    for seconds in (0, 0.05):
        with pytest.raises(ProgramTimeout, match=f"within {seconds} s"):
            slow.run(engine, timeout=seconds)


def test_leaving_a_stream_gives_its_requests_up(engine) -> None:
    stream = tw.program(_endless).stream(engine)
    for piece in stream:
        assert piece.name == "long"
        break
    stream.close()
    assert stream.result is None


def test_a_failure_names_the_variable_and_the_branch(engine) -> None:
    @tw.program
    def failing(s, words):
        branches = s.fork(3)
        for count, b in zip(words, branches, strict=True):
            b += "fox " * count
            b += tw.gen("text", max_new_tokens=1)
        s.join(branches)

    where = "gen 'text' in branch 1: the prompt: expected at most 255 tokens"
    with pytest.raises(UsageError, match="^" + where):
        failing.run(engine, words=[1, 400, 1])
    with pytest.raises(UsageError, match="^run 1: " + where):
        failing.run_batch(engine, [{"words": [1, 1, 1]}, {"words": [1, 400, 1]}])


def test_an_output_that_is_cut_short_of_its_form_is_an_error(engine) -> None:
    @tw.program
    def cut(s):
        s += "the "
        s += tw.gen("word", regex="[a-z]{40}", max_new_tokens=3)

    with pytest.raises(UsageError, match="gen 'word': its form: .*max_new_tokens=3"):
        cut.run(engine)


def _twice(s):
    s += "a" + LONG
    s += tw.gen("x", max_new_tokens=1)
    s += tw.gen("x", max_new_tokens=1)


def _unset(s):
    s += "a"
    s += tw.gen("x", max_new_tokens=1)
    s["y"]


def _mixed(s):
    s += tw.user("a")
    s += "b"


def _turned(s):
    s += "b"
    s += tw.user("a")


def _foreign(s):
    (branch,) = s.fork(1)
    s.join(branch.fork(2))


def _said_late(s):
    (branch,) = s.fork(1)
    s.join([branch])
    branch += "a"


def _clash(s):
    (branch,) = s.fork(1)
    branch += "a"
    branch += tw.gen("x", max_new_tokens=1)
    s += "a"
    s += tw.gen("x", max_new_tokens=1)
    s.join([branch])


def _number(s):
    s += 3


def _fork_none(s):
    s.fork(0)


def _no_context(s):
    s += tw.select("x", ["a", "b"])


def _nothing(s):
    s += tw.gen("x")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_twice, "variable 'x': expected a name that is not set yet"),
        (_unset, "variable 'y': expected one that is set here: x"),
        (_mixed, "what is said: expected turns alone, or text alone, found text beside turns"),
        (_turned, r"what is said: .* found user\(…\) behind plain text"),
        (_foreign, r"join: .* found branch \(0, 0\)"),
        (_said_late, r"branch \(0,\): expected a branch that has not been joined"),
        (_clash, "variable 'x': expected a name that is not set yet"),
        (_number, "what is said: .* found 3"),
        (_fork_none, "fork: .* found 0"),
        (_no_context, "select 'x': the options: .* found an empty prompt"),
        (_nothing, "gen 'x': the prompt: expected at least one token"),
    ],
)
def test_what_is_against_the_rules_is_refused(engine, body, message) -> None:
    with pytest.raises(UsageError, match="^" + message):
        tw.program(body).run(engine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tw.gen(""), "the variable's name"),
        (lambda: tw.gen("x", n=2), "gen 'x': expected only max_new_tokens.* found n"),
        (lambda: tw.gen("x", regex="a", choices=["b"]), "gen 'x': .* found regex and choices"),
        (lambda: tw.gen("x", top_p=2), "SamplingParams.top_p"),
        (lambda: tw.select("x", "ab"), "select 'x': expected several texts"),
        (lambda: tw.select("x", ["a", ""]), "select 'x': expected several texts"),
        (lambda: tw.user(tw.gen("x")), r"user\(…\): expected texts"),
        (lambda: tw.assistant(3), r"assistant\(…\): expected texts, gen or select"),
        (lambda: tw.program(lambda s, model: None), "program <lambda>: .* found model"),
        (lambda: tw.program(_nothing).run("model.gguf"), "what the program runs on: .*model.gguf"),
        (lambda: tw.program(_nothing).run(3), "what the program runs on: .* found 3"),
    ],
)
def test_arguments_that_cannot_be_taken_are_refused(make, message) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_state_outlives_no_run(engine) -> None:
    kept = []
    result = tw.program(lambda s: kept.append(s)).run(engine)
    with pytest.raises(UsageError, match="found one that has ended"):
        kept[0].__iadd__("a").__iadd__(tw.gen("x"))
    with pytest.raises(
        UsageError, match="variable 'x': expected one that the program has set: none"
    ):
        result["x"]
