"""How large a request's body may be."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import error_body

_FILES = "/api/blobs/"


class BodyLimit:
    """Refuses bodies that are too large, before they are read.

    Args:
        app: behind it.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        # Files of models are of any size, and are never held in memory.
        if scope["type"] != "http" or scope["path"].startswith(_FILES):
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.most:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= self.most else {"type": "http.disconnect"}

        async def answered(message: Message) -> None:
            if seen <= self.most:
                await send(message)

        await self.app(scope, counted, answered)
        if seen > self.most:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        message = f"the body is larger than {self.most} bytes"
        response = JSONResponse(error_body(status, message), status, {"Connection": "close"})
        await response(scope, receive, send)
