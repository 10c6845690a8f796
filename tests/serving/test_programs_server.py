"""Programs against a server say what they say on its engine; what servers do wrong is named."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import pytest

import tilewright as tw
from tilewright.errors import UsageError
from tilewright.serving.programs import ServerError, server_model
from tilewright.serving.programs.exchange import Busy
from tilewright.serving.programs.prompts import Prompt

WARM = {"temperature": 1.0, "max_new_tokens": 5}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}


@tw.program
def talk(s, topic):
    s += tw.system("terse fox")
    s += tw.user(f"the quick {topic}")
    s += tw.assistant("fox ", tw.gen("first", seed=1, stop=["zq"], top_k=40, **WARM))
    branches = s.fork(2)
    for index, b in enumerate(branches):
        b += tw.user(f"dog {index}")
        b += tw.assistant(
            tw.gen("text", seed=index, **WARM), " or ", tw.gen("more", seed=5, **WARM)
        )
    s.join(branches)
    s += tw.user("form")
    form = {**SCHEMA, "additionalProperties": False}
    s += tw.assistant(tw.gen("card", json_schema=form, max_new_tokens=60, temperature=1, seed=2))


@tw.program
def plain(s):
    s += "the quick "
    s += tw.gen("regex", regex="[a-c]{3}")
    s += tw.gen("choice", choices=["fox", "dog"])
    s += tw.select("best", ["brown", "lazy dog"])


def test_a_server_says_what_its_engine_says(served, engine) -> None:
    url = f"{served.url}/v1"
    result, own = talk.run(url, topic="dog", model="tiny"), talk.run(engine, topic="dog")
    assert result.variables == own.variables and result.messages() == own.messages()
    assert json.loads(result["card"])["n"] in (1, 2)
    assert result.outcomes["first"].finish_reason == own.outcomes["first"].finish_reason
    assert result.usage.completion_tokens == own.usage.completion_tokens
    assert result.usage.cached_tokens > 0
    results = talk.run_batch(f"{url}/", [{"topic": "dog"}, {"topic": "fox"}])
    assert results[0].variables == own.variables != results[1].variables


def test_forms_and_choices_are_kept_to(served, engine) -> None:
    result, own = plain.run(f"{served.url}/v1"), plain.run(engine)
    assert result["regex"] == own["regex"] and result["choice"] == own["choice"]
    assert result["best"] in ("brown", "lazy dog")
    assert result.outcomes["best"].scores is None and own.outcomes["best"].scores


@pytest.fixture
def requests(engine):
    """Those that the engine's loop was given."""
    observer = SimpleNamespace(seen=[], stepped=lambda *step: None)
    observer.added = observer.seen.append
    engine.loop.observers.append(observer)
    yield observer.seen
    engine.loop.observers.remove(observer)


def test_text_comes_as_it_is_written(served) -> None:
    stream = talk.stream(f"{served.url}/v1", topic="dog")
    pieces = list(stream)
    first = [piece.text for piece in pieces if piece.name == "first"]
    assert len(first) > 1 and "".join(first) == stream.result["first"]


def test_leaving_a_stream_hangs_up(served, engine, requests) -> None:
    @tw.program
    def endless(s):
        s += "the quick"
        s += tw.gen("long", max_new_tokens=240, ignore_eos=True)

    for _ in endless.stream(f"{served.url}/v1"):
        break
    (request,) = requests
    while not request.finished and not request.abandoned:
        with engine.loop.lock:  # until the next step, and 240 at most
            pass
    assert request.abandoned


def test_what_a_server_refuses_is_named(served, serve) -> None:
    with serve(keys=("right",)) as locked:
        url = f"{locked.url}/v1"
        with pytest.raises(ServerError, match="gen 'regex': .* found 401.* right api_key"):
            plain.run(url, api_key="wrong")
        assert plain.run(url, api_key="right")["choice"]
    with pytest.raises(ServerError, match="no model 'other' here"):
        plain.run(f"{served.url}/v1", model="other")
    with pytest.raises(ServerError, match="found 404"):
        plain.run(served.url)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ServerError, match="found ConnectionRefusedError"):
        plain.run(f"http://127.0.0.1:{port}/v1")


@contextmanager
def answering(answer: bytes):
    """The URL of a server that has one answer for one client."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            client.settimeout(30)  # a failure ends
            with client:
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):  # hanging up on what is unread would be a reset
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'data: {"choices": [{"text": "a"}]}\n\n', "found an end in its midst"),
        (b'data: {"error": {"message": "it broke"}}\n\n', "found it broke"),
        (b"data: no JSON\n\n", "expected events of JSON"),
        (
            b'data: {"choices": [{"text": "{1", "finish_reason": "stop"}]}\n\n',
            "gen 'card': .* expected JSON of the schema, found '{1'.*response_format",
        ),
        (
            b'data: {"choices": [{"text": "cat", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n',
            "expected one of 'fox', 'dog', found 'cat'.*structured_outputs",
        ),
    ],
)
def test_answers_that_are_none_are_errors(answer, message) -> None:
    @tw.program
    def one(s):
        s += "the "
        s += tw.gen("card", json_schema={}) if "card" in message else choice

    choice = tw.select("animal", ["fox", "dog"])
    with answering(answer) as url, pytest.raises(ServerError, match=message):
        one.run(url)


@pytest.mark.parametrize("times", [2, 6])
def test_a_busy_server_is_asked_again(monkeypatch, times) -> None:
    asked = []

    def run(exchange) -> str:
        asked.append(exchange)
        if len(asked) <= times:
            busy = Busy("it", expected="an answer", found="429", remedy="Wait.")
            busy.seconds = 0
            raise busy
        return "an outcome"

    monkeypatch.setattr(server_model.Exchange, "run", run)
    model = server_model.ServerModel("http://localhost:1/v1", None, None)
    work = model.generate(Prompt(None, "a"), tw.gen("x"), print)
    if times == 2:
        assert asyncio.run(work) == "an outcome" and len(asked) == 3
    else:
        with pytest.raises(Busy):
            asyncio.run(work)


def test_a_full_queue_says_how_long_to_wait(serve) -> None:
    with serve(most_requests=0) as server:
        exchange = server_model.Exchange(
            f"{server.url}/v1/completions", {}, b'{"prompt": "a"}', print
        )
        with pytest.raises(Busy) as caught:
            exchange.run()
        assert caught.value.seconds == 1


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


SAID = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox "}]
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}


def test_a_message_goes_on(client, engine) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=SAID, max_tokens=4, temperature=0, extra_body=GOES_ON
    )
    text = engine.tokenizer.apply_chat_template(SAID[:1]) + "fox "
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    (own,) = engine.generate([ids], tw.SamplingParams(max_new_tokens=4))
    assert found.choices[0].message.content == own.text
    assert found.usage.prompt_tokens == len(ids)
    closed = client.chat.completions.create(
        model="tiny", messages=SAID, max_tokens=1, extra_body={"add_generation_prompt": False}
    )
    text = engine.tokenizer.apply_chat_template(SAID, add_generation_prompt=False)
    assert closed.usage.prompt_tokens == len(
        engine.tokenizer.encode(text, add_special_tokens=False)
    )


@pytest.mark.parametrize(
    ("messages", "extra", "message"),
    [
        (SAID[:1], GOES_ON, "continue_final_message: expected a last message of the assistant's"),
        (SAID, {"continue_final_message": True}, "and add_generation_prompt false"),
        (SAID, {"structured_outputs": {}}, "exactly one of"),
        (SAID, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one of"),
        (
            SAID,
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs: expected no response_format",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_a_400(client, messages, extra, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, extra_body=extra
        )


def test_an_url_needs_its_scheme() -> None:
    with pytest.raises(UsageError, match="what the program runs on: .*'localhost:8000/v1'"):
        plain.run("localhost:8000/v1")
