"""Routes whose endpoint takes one model from the body, read without FastAPI's resolver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, get_type_hints

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

_SMALL = 64 << 10  # bytes of a body: reading them takes less than a thread costs that waits for us


class BodyRoute(APIRoute):
    """A route of `endpoint(body, http)`, where `body` is a pydantic model and `http` the request.

    FastAPI describes it as any other. Its resolver of dependencies, of which there are none here,
    takes longer than the endpoint does, so bytes become the model directly, and a large body does
    so on another thread. What is wrong is raised as FastAPI raises it.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:
        super().__init__(path, endpoint, **more)
        self._model: type[BaseModel] = get_type_hints(endpoint)["body"]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # 405
            return
        http = Request(scope, receive, send)
        response = await self.endpoint(await self._body(http), http)
        await response(scope, receive, send)

    async def _body(self, http: Request) -> BaseModel:
        try:
            content = await http.body()
        except ClientDisconnect as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "the body did not arrive") from error
        if not _is_json(http.headers.get("content-type", "")):
            # Not guessed at: a page of another site may send any other kind unasked.
            wrong = {"type": "content_type", "loc": ("body",), "msg": "Send application/json"}
            raise RequestValidationError([wrong])
        read = self._model.model_validate_json
        try:
            if len(content) <= _SMALL:
                return read(content)
            return await asyncio.to_thread(read, content)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError(
                [{**one, "loc": ("body", *one["loc"])} for one in found]
            ) from None


def add_posts(app: FastAPI, endpoints: Mapping[str, Callable[..., Any]]) -> None:
    """Adds endpoints of a body to an app, by path, for POST."""
    for path, endpoint in endpoints.items():
        app.router.add_api_route(path, endpoint, methods=["POST"], route_class_override=BodyRoute)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    main, _, sub = kind.partition("/")
    return main == "application" and (sub == "json" or sub.endswith("+json"))
