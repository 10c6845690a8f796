"""OpenAI's own client against the server: what it sends is understood, what it gets is parsed."""

from __future__ import annotations

import json

import openai
import pytest

import tilewright as tw

MESSAGES = [{"role": "user", "content": "hello there"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(engine):
    """The engine's own answers, without the server."""

    def tokens(prompt, **params):
        given = {"max_new_tokens": 6, **params}
        return engine.generate(prompt, tw.SamplingParams(**given))

    return tokens


def test_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here, but: tiny"):
        client.models.retrieve("other")


def test_a_completion_is_the_engines(client, expected) -> None:
    found = client.completions.create(model="tiny", prompt="one two", logprobs=2, **GREEDY)
    (own,) = expected("one two", logprobs=2)
    choice = found.choices[0]
    assert (choice.text, choice.finish_reason) == (own.text, own.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx([p.logprob for p in own.logprobs])
    assert found.usage.prompt_tokens == own.usage.prompt_tokens
    assert found.usage.completion_tokens == len(own.token_ids)


def test_several_prompts_and_answers_keep_their_order(client, expected, engine) -> None:
    prompts = ["one two", "three four five"]
    found = client.completions.create(model="tiny", prompt=prompts, n=2, echo=True, **GREEDY)
    own = [one.text for one in expected(prompts, n=2)]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [engine.tokenizer.decode(engine.tokenizer.encode(p)) for p in prompts for _ in "ab"]
    assert [c.text for c in found.choices] == [a + b for a, b in zip(texts, own, strict=True)]
    ids = client.completions.create(model="tiny", prompt=[[5, 6], [7, 8, 9]], **GREEDY)
    assert [c.text for c in ids.choices] == [c.text for c in expected([[5, 6], [7, 8, 9]])]


@pytest.mark.parametrize("prompt", ["one two", ["one two", "three"]])
def test_a_stream_adds_up_to_the_answer(client, expected, prompt) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, **GREEDY}
    texts: dict[int, str] = {}
    last = None
    for piece in client.completions.create(model="tiny", prompt=prompt, **options):
        for choice in piece.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
        last = piece
    own = expected(prompt)
    assert [texts[index] for index in sorted(texts)] == [one.text for one in own]
    assert last.usage.completion_tokens == sum(len(one.token_ids) for one in own)


def test_a_chat_answers_as_the_template_has_it(client, expected, engine) -> None:
    (own,) = expected([engine.chat_prompt(MESSAGES)], logprobs=1)
    ask = {"model": "tiny", "messages": MESSAGES, **GREEDY}
    found = client.chat.completions.create(logprobs=True, top_logprobs=1, **ask)
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", own.text)
    assert len(found.choices[0].logprobs.content) == len(own.token_ids)
    pieces = list(client.chat.completions.create(stream=True, **ask))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == own.text
    assert pieces[-1].choices[0].finish_reason == own.finish_reason
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
    again = client.chat.completions.create(**{**ask, "messages": parts})
    assert again.choices[0].message.content == own.text
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_an_answer_keeps_to_a_schema(client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=form, max_tokens=60, seed=3
    )
    data = json.loads(found.choices[0].message.content)
    assert isinstance(data["ok"], bool) and data["n"] in (1, 2, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_has_to_be_called_is_called(client, stream) -> None:
    tools = [{"type": "function", "function": {"name": "check", "parameters": SCHEMA}}]
    choice = {"type": "function", "function": {"name": "check"}}
    ask = {"model": "tiny", "messages": MESSAGES, "tools": tools, "tool_choice": choice}
    found = client.chat.completions.create(max_tokens=80, seed=1, stream=stream, **ask)
    if stream:
        (last,) = [piece.choices[0] for piece in found]
        calls, reason = last.delta.tool_calls, last.finish_reason
    else:
        calls, reason = found.choices[0].message.tool_calls, found.choices[0].finish_reason
    assert reason == "tool_calls" and calls[0].function.name == "check"
    assert json.loads(calls[0].function.arguments)["n"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n: "),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10, "extra_body": {"min_p": "many"}}, "min_p"),
        ({"stop": ["x" * 2000]}, "stop"),
        ({"logit_bias": {"3": 200}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "system, developer, user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, "max_model_len|context"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"tool_choice": "required"}, "no tools"),
        ({"extra_body": {"temperature": float("nan")}}, "."),
    ],
)
def test_what_cannot_be_taken_is_a_400_that_says_why(client, change, words) -> None:
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **change}
    with pytest.raises((openai.BadRequestError, ValueError), match=words):
        client.chat.completions.create(**ask)
    fine = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert fine.choices


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": [[5, -3]], "echo": True}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": [100_000]}, "vocab|token id"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": []}, "at least one token"),
        ({"extra_body": {"repetition_penalty": 5e-324}}, "repetition_penalty"),
    ],
)
def test_prompts_and_penalties_that_cannot_be(client, change, words) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 2, **change})


def test_another_model_is_not_there(client) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9' here"):
        client.completions.create(model="gpt-9", prompt="x")
