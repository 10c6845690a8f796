"""Ollama's own client against the server."""

from __future__ import annotations

import json

import ollama
import pytest

import tilewright as tw

MESSAGES = [{"role": "user", "content": "hello there"}]
GREEDY = {"temperature": 0, "num_predict": 6}


@pytest.fixture(scope="module")
def client(served):
    return ollama.Client(served.url)


@pytest.fixture(scope="module")
def own(engine):
    params = tw.SamplingParams(max_new_tokens=6)
    return engine.generate([engine.chat_prompt(MESSAGES)], params)[0]


def test_what_is_served_is_listed(client, served) -> None:
    (model,) = client.list().models
    assert model.model == "tiny:latest" and model.size == served.service.bytes_of_weights > 0
    assert client.ps().models[0].context_length == served.service.engine.config.max_model_len
    shown = client.show("tiny")
    assert "messages" in shown.template and "completion" in shown.capabilities


@pytest.mark.parametrize("name", ["tiny", "tiny:latest"])
def test_a_chat_is_the_engines(client, own, name) -> None:
    found = client.chat(name, MESSAGES, options=GREEDY)
    assert (found.message.role, found.message.content) == ("assistant", own.text)
    assert found.done and found.done_reason == own.finish_reason
    assert (found.prompt_eval_count, found.eval_count) == (own.usage.prompt_tokens, 6)
    assert found.total_duration >= found.eval_duration > 0
    pieces = list(client.chat(name, MESSAGES, options=GREEDY, stream=True))
    assert "".join(piece.message.content for piece in pieces) == own.text
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_text_is_a_chat_of_one_message_or_raw(client, own, engine) -> None:
    found = client.generate("tiny", "hello there", options=GREEDY)
    assert found.response == own.text
    assert list(found.context) == engine.chat_prompt(MESSAGES) + own.token_ids
    raw = client.generate("tiny", "one two", raw=True, options=GREEDY)
    (plain,) = engine.generate("one two", tw.SamplingParams(max_new_tokens=6))
    assert raw.response == plain.text
    pieces = list(client.generate("tiny", "one two", raw=True, options=GREEDY, stream=True))
    assert "".join(piece.response for piece in pieces) == plain.text


def test_an_answer_keeps_to_a_schema(client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    found = client.chat("tiny", MESSAGES, format=schema, options={"num_predict": 60, "seed": 1})
    assert json.loads(found.message.content)["n"] in (1, 2)


@pytest.mark.parametrize(
    ("status", "words", "ask"),
    [
        (404, "no model 'other' here", {"model": "other"}),
        (400, "options.temperature", {"options": {"temperature": -1}}),
        (400, "options.stop", {"options": {"stop": ["x" * 5000]}}),
        (400, "at least one", {"messages": []}),
        (400, "format", {"format": "yaml"}),
    ],
)
def test_what_cannot_be_taken_is_said_in_a_text(served, status, words, ask) -> None:
    import httpx

    found = httpx.post(
        f"{served.url}/api/chat", json={"model": "tiny", "messages": MESSAGES, **ask}
    )
    assert found.status_code == status and words in found.json()["error"]


def test_without_a_registry_models_are_not_made(client) -> None:
    with pytest.raises(ollama.ResponseError, match="keeps no models"):
        client.copy("tiny", "other")
    with pytest.raises(ollama.ResponseError, match="neither downloaded"):
        client.pull("other")
