"""Keys, limits, sizes, ends: who is let in, and what happens to those who go."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest
from starlette.requests import ClientDisconnect

from tilewright.errors import VerificationError
from tilewright.runtime import SamplingParams
from tilewright.runtime.sampling import BROKEN, Sampled
from tilewright.serving.access import ANYBODY, Access, Limits
from tilewright.serving.answers import Answer, split_calls
from tilewright.serving.failures import Refused
from tilewright.serving.service import Rules, Service
from waiting import wait_until

BODY = {"model": "tiny", "prompt": "one two", "max_tokens": 2, "temperature": 0}


def test_about_itself(served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}
    httpx.post(f"{served.url}/v1/completions", json=BODY)
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "tilewright:num_requests_running" in metrics
    assert "/v1/chat/completions" in httpx.get(f"{served.url}/openapi.json").json()["paths"]
    missing = httpx.get(f"{served.url}/v2/nothing")
    assert missing.status_code == 404 and "error" in missing.json()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"prompt": "\\ud800"}'],
)
def test_bodies_that_are_none_are_a_400(served, content) -> None:
    found = httpx.post(
        f"{served.url}/v1/completions",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_a_413(serve) -> None:
    def pieces():
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 1000
        yield b'"}'

    with serve(most_body=20_000) as server:
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, json={"prompt": "x" * 30_000}).status_code == 413
        assert httpx.post(url, content=pieces()).status_code == 413
        assert httpx.post(url, json=BODY).status_code == 200


def test_keys_are_asked_for(serve) -> None:
    with serve(keys=("secret", "other")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for call in (
                lambda h: httpx.post(f"{server.url}/v1/completions", json=BODY, headers=h),
                lambda h: httpx.get(f"{server.url}/v1/models", headers=h),
            ):
                found = call(headers)
                assert found.status_code == 401 and "secret" not in found.text
        good = {"Authorization": "Bearer other"}
        assert httpx.post(f"{server.url}/v1/completions", json=BODY, headers=good).is_success
        assert httpx.get(f"{server.url}/health").is_success  # of no confidence


def test_a_full_server_says_when_to_come_back(serve) -> None:
    with serve(most_requests=2) as server:
        found = httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": ["a", "b", "c"]})
        assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
        assert found.json()["error"]["type"] == "rate_limit_error"
        # What of it had been taken is given up by the loop's next step, and so there is room again.
        wait_until(lambda: not server.service.worker.active)
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/completions", json=BODY).is_success


def test_limits_of_a_key() -> None:
    now = [0.0]
    access = Access(["a", "b"], Limits(per_minute=2, at_once=2), clock=lambda: now[0])
    one, other = access.who("Bearer a"), access.who("bearer b")
    lease = access.enter(one)
    access.enter(one).close()
    with pytest.raises(Refused, match="2 times a minute") as caught:
        access.enter(one)
    assert caught.value.retry_after == pytest.approx(30)
    access.enter(other)
    now[0] = 31.0
    second = access.enter(one)
    now[0] = 100.0
    with pytest.raises(Refused, match="2 requests running"):
        access.enter(one)
    lease.close()
    lease.close()  # does nothing more
    access.enter(one)
    second.close()
    assert Access([], Limits()).who(None) == ANYBODY


def _busy(served) -> bool:
    loop = served.service.engine.loop
    return bool(loop.scheduler.running or loop.scheduler.waiting or served.service.worker.active)


@pytest.fixture
def told(served, monkeypatch) -> SimpleNamespace:
    """Events of a server: `begun` when it holds a request, `over` when it holds none any more."""
    events = SimpleNamespace(begun=threading.Event(), over=threading.Event())
    worker = served.service.worker
    add, deliver = worker._add, worker._deliver

    def added(stream):
        add(stream)
        events.begun.set()

    def delivered(handed_over, ended):
        deliver(handed_over, ended)
        if not worker.active:
            events.over.set()

    monkeypatch.setattr(worker, "_add", added)
    monkeypatch.setattr(worker, "_deliver", delivered)
    return events


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_no_longer_computed(served, told, stream) -> None:
    body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        sock.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        assert told.begun.wait(30) and _busy(served)
    assert told.over.wait(30) and not _busy(served)
    assert httpx.post(f"{served.url}/v1/completions", json=BODY).is_success


def test_who_goes_before_the_first_event_leaves_nothing_behind(engine) -> None:
    async def gone(_: object) -> None:
        raise OSError("the client has gone")

    async def go() -> None:
        service = Service(engine, Rules(("tiny",), limits=Limits(at_once=1)))
        service.worker.start()
        lease = service.access.enter(ANYBODY)
        asked = [([5, 6, 7], SamplingParams(max_new_tokens=200, ignore_eos=True))]
        answer = Answer("tiny", service.spell, None, 1)
        response = await service.answer(None, lease, asked, answer, streams=True)
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect):
            await response(scope, None, gone)
        service.access.enter(ANYBODY).close()
        await service.worker.close()
        assert service.worker.active == 0

    asyncio.run(go())


def test_a_step_that_fails_is_a_500_and_others_go_on(serve, monkeypatch) -> None:
    with serve() as server:
        loop = server.service.engine.loop
        error = VerificationError("logits", expected="numbers", found="NaN", remedy="Verify.")
        with monkeypatch.context() as patch:
            patch.setattr(loop, "step", lambda: (_ for _ in ()).throw(error))
            found = httpx.post(f"{server.url}/v1/completions", json=BODY)
            assert found.status_code == 500 and "NaN" in found.json()["error"]["message"]
            streamed = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": True})
            assert '"error"' in streamed.text and "[DONE]" not in streamed.text
        assert httpx.post(f"{server.url}/v1/completions", json=BODY).is_success
        assert not _busy(server)


def test_logits_that_are_no_numbers_are_a_500_of_their_request_alone(serve, monkeypatch) -> None:
    with serve() as server:
        sampler = server.service.engine.loop.sampler
        real = sampler.sample

        def sample(logits, states):
            return [
                Sampled(BROKEN) if state.params.seed == 13 else one
                for state, one in zip(states, real(logits, states), strict=True)
            ]

        monkeypatch.setattr(sampler, "sample", sample)
        url, long = f"{server.url}/v1/completions", {**BODY, "max_tokens": 20, "stream": True}
        with httpx.stream("POST", url, json={**long, "ignore_eos": True}) as other:
            lines = other.iter_lines()
            next(lines)
            found = httpx.post(url, json={**BODY, "seed": 13})
            assert found.status_code == 500 and "finite" in found.json()["error"]["message"]
            streamed = httpx.post(url, json={**BODY, "seed": 13, "stream": True})
            assert '"error"' in streamed.text and "[DONE]" not in streamed.text
            text = "\n".join(lines)
        assert text.rstrip().endswith("[DONE]") and "error" not in text
        assert not _busy(server)


def test_a_server_that_ends_answers_what_it_has_begun(serve) -> None:
    with serve() as server:
        body = {**BODY, "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.handle_exit(15, None)
            assert server.service.draining
            text = "\n".join(lines)
        assert text.rstrip().endswith("[DONE]") and text.count('"text"') == 39
        server.thread.join(30)
        assert not server.thread.is_alive()


def test_an_answer_is_cut_at_its_deadline(serve) -> None:
    with serve(deadline=1e-9) as server:
        found = httpx.post(f"{server.url}/v1/completions", json=BODY).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 0


def test_calls_of_tools_are_found_in_a_text() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    text, calls = split_calls(f"so: {one} and {one}")
    assert text == "so:  and" and [call["function"]["name"] for call in calls] == ["f", "f"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"x": 1}
    for broken in ("plain", "<tool_call>{", "<tool_call>no json</tool_call> x"):
        assert split_calls(broken) == (broken, [])


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.api+json", True),
        ("", False),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
    ],
)
def test_a_body_is_read_as_what_it_says_it_is(served, kind, taken) -> None:
    found = httpx.post(
        f"{served.url}/v1/completions",
        content=json.dumps(BODY),
        headers={"Content-Type": kind},
    )
    assert found.is_success if taken else found.status_code == 400, found.text
    if not taken:
        assert "application/json" in found.json()["error"]["message"]


def test_a_large_body_is_read_too(served) -> None:
    body = {**BODY, "user": "x" * 100_000}
    assert httpx.post(f"{served.url}/v1/completions", json=body).is_success
    found = httpx.post(f"{served.url}/v1/completions", json={**body, "n": "many"})
    assert found.status_code == 400 and found.json()["error"]["param"] == "n"


def test_another_method_is_a_405(served) -> None:
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405
