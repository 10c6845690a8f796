"""What comes by mistake or malice: each a clear 4xx or a clean end, and others never notice."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from tilewright.errors import UsageError
from tilewright.serving.app import make_app
from tilewright.serving.connection import Connection
from tilewright.serving.schemas import check_schema
from tilewright.serving.server import allow_connections
from tilewright.serving.service import Rules
from waiting import wait_until

CHAT, TEXT, OLLAMA = "/v1/chat/completions", "/v1/completions", "/api/chat"
BODY = {"model": "tiny", "prompt": "one two", "max_tokens": 8, "temperature": 0}
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
STRING = {"type": "string"}
JSON = "Content-Type: application/json"
MANY = 200_000
LONGEST = 10  # seconds that anything here may take, on a machine that is busy with other tests


@contextmanager
def undisturbed(url: str) -> Iterator[None]:
    """Somebody who asks the same all the time, and has to get the same all the time."""
    over, took, found = threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.is_set() or len(found) < 2:
                began = time.monotonic()
                found.append(client.post(TEXT, json=BODY).text.split('"choices"')[1])
                took.append(time.monotonic() - began)
                over.wait(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)
    assert max(took) < LONGEST, took
    assert len({re.sub(r'"usage".*', "", one) for one in found}) == 1, found


@pytest.fixture(scope="module")
def client(served) -> Iterator[httpx.Client]:
    """Of the one who misbehaves, while somebody else asks all the time."""
    with undisturbed(served.url), httpx.Client(base_url=served.url, timeout=60) as found:
        yield found


def _refused(client, path: str, body: dict | bytes, words: str = "") -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    began = time.monotonic()
    found = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == 400, found.text[:300]
    error = found.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert words in message and len(message) < 1000, message
    assert time.monotonic() - began < LONGEST


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "temperature": (-1, float("nan"), float("inf"), "hot", [], 1e9),
        "top_p": (-0.1, float("nan"), 2),
        "min_p": (-1, 1.5),
        "top_k": (-5, 1.5, "x"),
        "repetition_penalty": (0, -1, float("nan"), 1e300),
        "presence_penalty": (float("nan"), -3),
        "frequency_penalty": (float("-inf"), 3),
        "max_tokens": (-1, 0, 2.5, float("nan"), "many"),
        "n": (-1, 0, 1000, float("nan")),
        "seed": (2**64, -(2**64), 0.5),
        "logit_bias": ({"3": float("nan")}, {"-4": 1}, {"x": 1}, [1], {3: 1e9}),
        "stop": ("x" * (1 << 20), ["x" * (1 << 20)], [""], 7, ["x"] * 1000, [None] * 1000),
        "stop_token_ids": ([-1], ["x"], {}),
        "min_tokens": (-1, float("nan")),
        "stream": ("perhaps", 3),
        "priority": (float("nan"), "first"),
        "response_format": ("json", {"type": "xml"}, {"type": "json_schema"}),
    }.items(),
)
def test_values_that_cannot_be(client, field, values) -> None:
    for value in values:
        _refused(client, TEXT, {**BODY, field: value}, field)


@pytest.mark.parametrize(
    ("path", "words", "body"),
    [
        (TEXT, "prompt", lambda: {"prompt": [None] * MANY}),
        (TEXT, "prompt", lambda: {"prompt": [[None]] * MANY}),
        (TEXT, "prompt", lambda: {"prompt": ["x"] * 10_000}),
        (TEXT, "characters", lambda: {"prompt": "x " * MANY}),
        (TEXT, "token", lambda: {"prompt": [2**30] * MANY}),
        (TEXT, "logit_bias", lambda: {**BODY, "logit_bias": {f"a{i}": 1 for i in range(MANY)}}),
        (TEXT, "stop_token_ids", lambda: {**BODY, "stop_token_ids": ["x"] * MANY}),
        (CHAT, "messages", lambda: {"messages": [1] * MANY}),
        (CHAT, "messages", lambda: {"messages": HELLO["messages"] * 10_000}),
        (CHAT, "characters", lambda: {"messages": [{"role": "user", "content": "x " * MANY}]}),
        (CHAT, "content", lambda: {"messages": [{"role": "user", "content": {"a": [[]]}}]}),
        (CHAT, "tools", lambda: {**HELLO, "tools": [{}] * MANY}),
        (OLLAMA, "messages", lambda: {"model": "tiny", "messages": [None] * MANY}),
        ("/api/generate", "context", lambda: {"model": "tiny", "context": ["x"] * MANY}),
    ],
)
def test_much_of_what_cannot_be(client, path, words, body) -> None:
    _refused(client, path, body(), words)


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xc3"}',
        b'{"prompt": "x", "max_tokens": ' + b"1" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x",}',
        b'{"prompt": "x"}{',
        b'{"a":' * 100_000,
        b"\x00" * 1000,
        b'{"prompt": "\\ud83d", "max_tokens": 1}',
    ],
)
def test_bytes_that_are_no_request(client, content) -> None:
    _refused(client, TEXT, content)


def _deep(levels: int) -> dict:
    found = STRING
    for _ in range(levels):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


def _doubling(keyword: str, levels: int) -> dict:
    """Each definition is the next one, twice."""
    names = [{"$ref": f"#/$defs/d{level + 1}"} for level in range(levels)]
    found = {f"d{level}": {keyword: [name, name]} for level, name in enumerate(names)}
    return {"$defs": {**found, f"d{levels}": STRING}, "$ref": "#/$defs/d0"}


def _product(factors: int, terms: int) -> dict:
    """All of some alternatives, whose combinations grow as a power."""

    def one(name: str) -> dict:
        return {"type": "object", "properties": {name: STRING}, "required": [name]}

    each = [[one(f"{i}_{j}") for j in range(terms)] for i in range(factors)]
    return {"allOf": [{"anyOf": alternatives} for alternatives in each]}


def _form(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


@pytest.mark.parametrize(
    "schema",
    [
        _deep(100),
        _deep(460),
        _product(4, 10),
        {"enum": [f"value {i}" for i in range(30_000)]},
        {"type": "object", "properties": {f"p{i}": STRING for i in range(5000)}},
        {"type": "integer", "multipleOf": 1234567891},
        {"allOf": [{"type": "string", "pattern": f"^.*{i}.*$"} for i in range(30)]},
        {"type": "string", "pattern": "(" * 2000},
        {"type": "number", "minimum": float("nan")},
        {"$ref": "#/$defs/nowhere"},
        {"type": ["no", "type"]},
    ],
)
def test_forms_that_nobody_could_keep(client, schema) -> None:
    _refused(client, CHAT, {**HELLO, "response_format": _form(schema)})


@pytest.mark.parametrize(
    ("fits", "most"),
    [
        (lambda n: {"type": "object", "properties": {f"{i}": {} for i in range(n)}}, 1000),
        (lambda n: {"const": "x" * n}, (1 << 17) - len("const") - 3),
        (lambda n: functools.reduce(lambda inner, _: {"not": inner}, range(n - 1), {}), 120),
    ],
)
def test_forms_have_their_bounds(fits, most) -> None:
    check_schema(fits(most))
    with pytest.raises(UsageError, match="the JSON schema: expected at most"):
        check_schema(fits(most + 1))


@pytest.mark.parametrize(
    "schema",
    [
        _doubling("allOf", 16),
        _doubling("anyOf", 16),
        {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
        {"type": "string", "pattern": "^(.*a.{30}b)$"},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 10**6},
    ],
)
def test_forms_that_only_look_bad_are_kept_to(client, schema) -> None:
    found = client.post(CHAT, json={**HELLO, "response_format": _form(schema), "max_tokens": 8})
    assert found.status_code == 200 or "SamplingParams" in found.text, found.text[:300]


def test_who_wants_a_form_waits_for_forms_and_nobody_else_does(client, served, monkeypatch) -> None:
    loop, going = served.service.engine.loop, threading.Event()
    prepare, found = loop.prepare, []

    def slow(prompt, params, **more):
        assert params.structured_outputs is None or going.wait(30)
        return prepare(prompt, params, **more)

    def send() -> None:
        body = {**HELLO, "response_format": {"type": "json_object"}, "max_tokens": 1}
        found.append(client.post(CHAT, json=body).status_code)

    monkeypatch.setattr(loop, "prepare", slow)
    threads = [threading.Thread(target=send) for _ in range(40)]  # more than asyncio has
    for thread in threads:
        thread.start()
    try:
        assert client.post(TEXT, json=BODY).is_success and not found
    finally:
        going.set()
        for thread in threads:
            thread.join(60)
    assert found == [200] * len(threads)


def _connect(server, receive_buffer: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    found = socket.socket()
    if receive_buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(30)
    found.connect((host, int(port)))
    return found


def _request(path: str, body: dict, *headers: str, length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", JSON, *headers]
    told = f"Content-Length: {len(data) if length is None else length}"
    return "\r\n".join([*lines, told, "", ""]).encode() + data


def _rest(sock: socket.socket) -> bytes:
    """All that comes until the other side ends it, in whatever way."""
    found = b""
    try:
        while part := sock.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (413, _request(TEXT, BODY, length=10**12)),
        (400, _request(TEXT, BODY, length=-1)),
        (400, _request(TEXT, BODY, "Content-Length: 3")),
        (
            400,
            b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        ),
        (400, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * MANY + b"\r\n\r\n"),
        (400, b"GET /" + b"y" * MANY + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),  # TLS
        (400, b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        (405, b"PATCH /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        (400, b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
    ],
)
def test_heads_that_are_none(client, served, status, data) -> None:
    with _connect(served) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has been refused before its end
        found = _rest(sock)
    # Who still sends when they are refused may be reset before they have read the refusal.
    assert not found or int(found.split(b" ", 2)[1]) == status, found[:200]


def test_who_never_goes_on_is_hung_up_on(serve) -> None:
    whole = _request(TEXT, BODY)
    with serve(patience=0.3) as server, undisturbed(server.url):
        for data in (b"", b"POST /v1/comp", _request(TEXT, BODY, length=500), whole):
            with _connect(server) as sock:
                sock.sendall(data)
                if data is whole:  # and then half a next one
                    assert sock.recv(65536).startswith(b"HTTP/1.1 200")
                    sock.sendall(data[:40])
                began = time.monotonic()
                assert b"HTTP" not in _rest(sock)
                assert time.monotonic() - began < LONGEST


def test_who_reads_nothing_is_hung_up_on(serve) -> None:
    with serve(patience=0.3) as server:
        for listening in server.server.servers[0].sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {**BODY, "max_tokens": 90, "ignore_eos": True, "stream": True, "logprobs": 20}
        with undisturbed(server.url), _connect(server, receive_buffer=4096) as sock:
            sock.sendall(_request(TEXT, body))
            wait_until(lambda: server.service.worker.active > 1)
            wait_until(lambda: len(server.server.server_state.connections) == 1)
            assert b"[DONE]" not in _rest(sock)
        wait_until(lambda: not server.service.access._running)
        wait_until(lambda: not server.service.worker.active)  # the loop's next step gives it up


def test_who_takes_a_part_is_hung_up_on(served) -> None:
    aborted = []

    async def go() -> None:
        connection = Connection(
            uvicorn.Config(make_app(served.service.engine, Rules(("tiny",)))),
            ServerState(),
            {},
            asyncio.get_running_loop(),
            patience=0,
        )
        gone = asyncio.Event()
        connection.connection_made(
            SimpleNamespace(
                get_extra_info=lambda name, default=None: default,
                abort=lambda: (aborted.append(True), gone.set()),
            )
        )
        connection._arrival.cancel()
        connection.pause_writing()
        connection.resume_writing()  # in time
        connection.pause_writing()
        await asyncio.wait_for(gone.wait(), 30)

    asyncio.run(go())
    assert aborted == [True]


def test_clients_that_are_killed_leave_nothing_behind(serve) -> None:
    body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with serve() as server:
        with undisturbed(server.url):
            for _ in range(8):
                sock = _connect(server)
                sock.sendall(_request(TEXT, body))
                assert sock.recv(100)
                # A reset, as of a process that is killed with data unread.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
        wait_until(lambda: not server.service.worker.active)
        wait_until(lambda: not server.service.access._running)


@pytest.mark.parametrize("levels", [50, 200, 300, 460])
@pytest.mark.parametrize(
    "change",
    [
        lambda deep: {"messages": [{"role": "user", "content": "x", "more": deep}]},
        lambda deep: {"chat_template_kwargs": {"x": deep}},
        lambda deep: {"tools": [{"function": {"name": "f", "parameters": deep}}]},
    ],
)
def test_what_is_deep(client, change, levels) -> None:
    found = client.post(CHAT, json={**HELLO, **change(_deep(levels))})
    assert found.status_code in (200, 400), found.text


@pytest.mark.parametrize(
    "variables",
    [
        {"add_generation_prompt": False},
        {"messages": []},
        {"self": 1},
        {"x" * 10_000: [[[]]]},
        {"raise_exception": 1, "bos_token": None},
    ],
)
def test_variables_of_a_template_break_nothing(client, variables) -> None:
    body = {**HELLO, "chat_template_kwargs": variables}
    assert client.post(CHAT, json=body).status_code in (200, 400)


@pytest.mark.parametrize("field", ["top_k", "max_tokens", "min_tokens", "priority"])
def test_numbers_larger_than_any(client, field) -> None:
    found = client.post(TEXT, json={**BODY, field: 10**40, "stop": " "})
    assert found.status_code in (200, 400), found.text


def test_as_many_connections_as_the_system_allows() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
    try:
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
