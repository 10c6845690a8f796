"""A response in pieces: its head, its end, and who goes before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.requests import ClientDisconnect

from tilewright.serving.event_stream import EventStream


class Client:
    """The other end: notes what is sent, and stays until `gone` is set."""

    def __init__(self) -> None:
        self.sent: list[dict] = []
        self.headed, self.gone = asyncio.Event(), asyncio.Event()
        self.asked = 0

    async def receive(self) -> dict:
        self.asked += 1
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)
        self.headed.set()


def _run(events, calls: list[str], given_up=None) -> Client:
    """Sends events, made from a client, to that client."""

    async def run() -> Client:
        client = Client()
        stream = EventStream(
            events(client),
            "text/event-stream",
            given_up=lambda: (calls.append("given up"), given_up and given_up(client)),
            ended=lambda: calls.append("ended"),
        )
        async with asyncio.timeout(30):
            await stream({"type": "http"}, client.receive, client.send)
        return client

    return asyncio.run(run())


def test_events_that_come_at_once_cost_no_watching() -> None:
    async def events(_: Client) -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    calls: list[str] = []
    client = _run(events, calls)
    head, *pieces = client.sent
    assert head["type"] == "http.response.start" and head["status"] == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in head["headers"]
    assert [piece["body"] for piece in pieces] == [b"one", b"two", b""]
    assert [piece["more_body"] for piece in pieces] == [True, True, False]
    assert calls == ["ended"] and client.asked == 0


def test_the_head_does_not_wait_for_the_first_event() -> None:
    async def events(client: Client) -> AsyncIterator[bytes]:
        await client.headed.wait()
        yield b"late"

    client = _run(events, [])
    assert [one["type"] for one in client.sent] == ["http.response.start"] + [
        "http.response.body"
    ] * 2


def test_a_stream_without_events_has_a_head_and_an_end() -> None:
    async def events(_: Client) -> AsyncIterator[bytes]:
        for nothing in ():
            yield nothing

    assert [one["type"] for one in _run(events, []).sent] == [
        "http.response.start",
        "http.response.body",
    ]


def test_who_goes_is_no_longer_answered() -> None:
    over = asyncio.Event()

    async def events(client: Client) -> AsyncIterator[bytes]:
        await client.headed.wait()
        client.gone.set()
        await over.wait()
        for nothing in ():
            yield nothing

    calls: list[str] = []
    _run(events, calls, given_up=lambda _: over.set())
    assert calls == ["given up", "ended"]


def test_a_server_that_says_so_itself() -> None:
    async def refuse(_: dict) -> None:
        raise OSError("gone")

    async def events() -> AsyncIterator[bytes]:
        yield b"one"

    calls: list[str] = []

    async def run() -> None:
        stream = EventStream(
            events(), "text/plain", given_up=list, ended=lambda: calls.append("ended")
        )
        await stream({"type": "http"}, Client().receive, refuse)

    with pytest.raises(ClientDisconnect):
        asyncio.run(run())
    assert calls == ["ended"]
