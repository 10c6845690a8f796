"""Errors as OpenAI's clients read them: a status, and an object with a message and a type."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..errors import CapacityError, TilewrightError, UnsupportedError, UsageError
from .worker import QueueFull

RETRY_AFTER = 1  # seconds; a request that waits takes about so long to begin

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class Refused(Exception):
    """A request that is not taken.

    Args:
        status: of HTTP.
        message: what was wrong, and what to do.
        param: the field at fault.
        retry_after: seconds, for a 429 or a 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.retry_after = retry_after


def error_body(status: int, message: str, param: str | None = None) -> dict[str, object]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def status_of(error: BaseException) -> int:
    """The status of an error of ours: the client's fault, its pace, or ours."""
    if isinstance(error, QueueFull):
        return HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(error, UsageError | CapacityError | UnsupportedError):
        return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def handle_errors(app: FastAPI) -> None:
    """Makes every error of an app one of these."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(TilewrightError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _unexpected)


def _response(
    request: Request,
    status: int,
    message: str,
    param: str | None = None,
    retry_after: float | None = None,
) -> JSONResponse:
    headers: Mapping[str, str] | None = None
    if retry_after is not None:
        headers = {"Retry-After": str(max(1, round(retry_after)))}
    plain = request.url.path.startswith("/api/")  # Ollama's clients expect a text
    body = {"error": message} if plain else error_body(status, message, param)
    return JSONResponse(body, status, headers)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return _response(request, error.status, error.message, error.param, error.retry_after)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    status = status_of(error)
    wait = RETRY_AFTER if status == HTTPStatus.TOO_MANY_REQUESTS else None
    return _response(request, status, str(error), retry_after=wait)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place) or None
    # What was sent is not repeated: it may be long, and it is the sender's own.
    message = f"{field or 'the body'}: {first['msg']}"
    return _response(request, HTTPStatus.BAD_REQUEST, message, field)


async def _plain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _response(request, error.status_code, str(error.detail))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return _response(
        request, HTTPStatus.INTERNAL_SERVER_ERROR, f"unexpected: {type(error).__name__}"
    )
