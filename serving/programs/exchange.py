"""One request to a server, and the stream of events that answers it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from ...errors import TilewrightError
from ...runtime.output import Usage
from .prompts import Outcome

_SILENCE = 300.0  # seconds that a server may say nothing
_MOST_WAIT = 30.0  # seconds that it is believed when it says how long to wait


class ServerError(TilewrightError):
    """A server that cannot be reached, refuses a request, or breaks off."""


class Busy(ServerError):
    """A server that has too much to do.

    Attributes:
        seconds: after which to ask again.
    """

    seconds = 1.0


class Exchange:
    """A request that is sent and answered on one thread, and may be given up on another.

    Args:
        url: of http or https.
        headers: beside those that all requests have.
        body: JSON.
        heard: told of the text as it comes.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], body: bytes, heard: Callable[[str], None]
    ) -> None:
        self._url, self._body, self._heard = urlsplit(url), body, heard
        self._headers = {**headers, "Content-Type": "application/json"}
        self._socket: socket.socket | None = None
        self._given_up = False

    def run(self) -> Outcome:
        """Sends it, and reads the answer.

        Raises:
            Busy: the server asks for patience.
            ServerError: it cannot be reached, refuses, or breaks off.
        """
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        with closing(kind(self._url.netloc, timeout=_SILENCE)) as connection:
            try:
                connection.connect()
                self._socket = connection.sock
                if self._given_up:
                    raise self._error("an answer", "that nobody waits for it", "Ask again.")
                connection.request("POST", self._url.path, self._body, self._headers)
                with connection.getresponse() as response:  # may own the socket by now
                    if response.status != HTTPStatus.OK:
                        raise self._refused(response)
                    return self._read(response)
            except (OSError, HTTPException) as error:
                found = f"{type(error).__name__}: {error}"
                raise self._error("an answer", found, "Check the URL, and the server.") from error

    def abort(self) -> None:
        """Hangs up, so that the server need not go on."""
        self._given_up = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has hung up before
                return

    def _read(self, response: HTTPResponse) -> Outcome:
        texts: list[str] = []
        reason, usage = None, Usage(0, 0)
        for event in self._events(response):
            if "error" in event:
                raise self._error("a whole answer", _message(event), "Ask again.")
            for choice in event.get("choices") or ():
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                texts.append(text)
                self._heard(text)
                reason = choice.get("finish_reason") or reason
            if event.get("usage"):
                usage = _usage(event["usage"])
        if reason is None:
            raise self._error("a whole answer", "an end in its midst", "Ask again.")
        return Outcome("".join(texts), reason, usage)

    def _events(self, response: HTTPResponse) -> Iterator[dict[str, Any]]:
        for line in response:
            field, _, value = line.partition(b":")
            if field != b"data" or value.strip() == b"[DONE]":
                continue
            try:
                event = json.loads(value)
            except ValueError as error:
                raise self._error("events of JSON", repr(value)[:80], "Check the URL.") from error
            if isinstance(event, dict):
                yield event

    def _refused(self, response: HTTPResponse) -> ServerError:
        try:
            message = _message(json.loads(response.read(1 << 16)))
        except ValueError:
            message = response.reason
        found = f"{response.status}: {message}"
        if response.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            busy = Busy(
                self._url.netloc, expected="an answer", found=found, remedy="Send fewer at once."
            )
            wait = response.headers.get("Retry-After", "")
            busy.seconds = min(float(wait) if wait.isdigit() else Busy.seconds, _MOST_WAIT)
            return busy
        remedy = "Change what it names."
        if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            remedy = "Pass the right api_key."
        return self._error("an answer", found, remedy)

    def _error(self, expected: str, found: str, remedy: str) -> ServerError:
        return ServerError(self._url.netloc, expected=expected, found=found, remedy=remedy)


def _message(body: object) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:500]


def _usage(found: Mapping[str, Any]) -> Usage:
    details = found.get("prompt_tokens_details") or {}
    return Usage(
        int(found.get("prompt_tokens") or 0),
        int(found.get("completion_tokens") or 0),
        int(details.get("cached_tokens") or 0),
    )
