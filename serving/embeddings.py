"""The app that serves an encoder: OpenAI's /v1/embeddings and Ollama's /api/embed."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from ..version import __version__
from .access import Access
from .body_limit import BodyLimit
from .encoder import Encoder, shortened
from .failures import RETRY_AFTER, Refused, handle_errors
from .protocol import TokenId
from .service import Rules

_MOST_INPUTS = 2048  # as OpenAI has it
_NS = 10**9
_GENERATES = ("/v1/completions", "/v1/chat/completions", "/api/generate", "/api/chat")
_EMBEDS = ("/v1/embeddings", "/api/embed", "/api/embeddings")

Texts = Annotated[list[str], Field(min_length=1, max_length=_MOST_INPUTS)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """The body of POST /v1/embeddings."""

    input: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=_MOST_INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class EmbedRequest(BaseModel):
    """The body of POST /api/embed."""

    model: str
    input: str | Texts
    truncate: bool | None = True
    dimensions: Annotated[int, Field(ge=1)] | None = None


class EmbeddingService:
    """Answers requests with an encoder, one after the other: a batch fills the device.

    Attributes:
        draining: whether new requests are turned away, because the server is about to end.
    """

    def __init__(self, encoder: Encoder, rules: Rules) -> None:
        self.encoder, self.rules = encoder, rules
        self.access = Access(rules.keys, rules.limits)
        self.started, self.draining = int(time.time()), False
        self._held = 0
        self._thread = ThreadPoolExecutor(1, "encoder")

    def model(self, wanted: str | None) -> str:
        """The name of the model to send back; Refused for another."""
        names = self.rules.models
        if wanted is None or wanted.removesuffix(":latest") in names:
            return wanted or names[0]
        message = f"no model {wanted[:100]!r} here, but: {', '.join(names)}"
        raise Refused(HTTPStatus.NOT_FOUND, message, param="model")

    async def vectors(
        self, http: Request, read: Callable[[], list[list[int]]], dimensions: int | None
    ) -> tuple[Tensor, int]:
        """Vectors f32[B, D] of what a request asks for, and its tokens.

        Raises:
            Refused: 401, 429 or 503, or more dimensions than there are.
            UsageError: an input that cannot be taken.
        """
        who = self.access.who(http.headers.get("authorization"))
        if self.draining:
            message = "the server is ending"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after=RETRY_AFTER)
        if self._held >= self.rules.most_requests:
            message = f"{self._held} requests wait, as many as may"
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, message, retry_after=RETRY_AFTER)
        if dimensions is not None and dimensions > (most := self.encoder.facts.dimensions):
            message = f"dimensions: at most {most}, which the model has"
            raise Refused(HTTPStatus.BAD_REQUEST, message, param="dimensions")
        lease = self.access.enter(who)
        self._held += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._work, read, dimensions)
        finally:
            self._held -= 1
            lease.close()

    def _work(
        self, read: Callable[[], list[list[int]]], dimensions: int | None
    ) -> tuple[Tensor, int]:
        rows = read()
        found = self.encoder.embed(rows)
        if dimensions is not None:
            found = shortened(found, dimensions)
        return found, sum(map(len, rows))

    def close(self) -> None:
        """Ends its thread, behind what it does."""
        self._thread.shutdown()


def make_embedding_app(encoder: Encoder, rules: Rules) -> FastAPI:
    """The app that serves an encoder."""
    service = EmbeddingService(encoder, rules)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Tilewright", version=__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(BodyLimit, most=rules.most_body)
    handle_errors(app)
    _about(app, service)
    _embed(app, service)
    refuse(app, _GENERATES, "this server has an encoder, which generates nothing; it embeds texts")
    return app


def refuse_embeddings(app: FastAPI) -> None:
    """Says in an app that generates that it embeds nothing."""
    refuse(app, _EMBEDS, "this server has a causal LM, which embeds nothing: serve an encoder")


def refuse(app: FastAPI, paths: Sequence[str], message: str) -> None:
    """Answers requests to these paths with 400 and a message."""

    async def answer() -> Response:
        raise Refused(HTTPStatus.BAD_REQUEST, message)

    for path in paths:
        app.add_api_route(path, answer, methods=["POST"], include_in_schema=False)


def _about(app: FastAPI, service: EmbeddingService) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Requests are taken."""
        if service.draining:
            return JSONResponse({"status": "draining"}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ready"})

    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        """The names that the encoder answers to."""
        service.access.who(http.headers.get("authorization"))
        facts = {"object": "model", "created": service.started, "owned_by": "tilewright"}
        facts["max_model_len"] = service.encoder.facts.max_length
        return {"object": "list", "data": [{"id": one, **facts} for one in service.rules.models]}


def _embed(app: FastAPI, service: EmbeddingService) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
        """A vector for each input."""
        name = service.model(body.model)
        inputs = _inputs(body.input)

        def read() -> list[list[int]]:
            return [service.encoder.token_ids(one, at) for at, one in enumerate(inputs)]

        found, tokens = await service.vectors(http, read, body.dimensions)
        form = _base64 if body.encoding_format == "base64" else Tensor.tolist
        data = [
            {"object": "embedding", "index": at, "embedding": form(row)}
            for at, row in enumerate(found)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})

    @app.post("/api/embed")
    async def embed(body: EmbedRequest, http: Request) -> Response:
        """The same for Ollama's clients."""
        name, begun = service.model(body.model), time.perf_counter()
        inputs, cuts = _inputs(body.input), body.truncate is not False

        def read() -> list[list[int]]:
            return [service.encoder.token_ids(one, at, cuts=cuts) for at, one in enumerate(inputs)]

        found, tokens = await service.vectors(http, read, body.dimensions)
        spent = round((time.perf_counter() - begun) * _NS)
        facts = {"total_duration": spent, "load_duration": 0, "prompt_eval_count": tokens}
        return JSONResponse({"model": name, "embeddings": found.tolist(), **facts})


def _inputs(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One text or list of token ids an input."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(one, int) for one in given):
        return [[int(str(one)) for one in given]]
    return [one if isinstance(one, str) else _ids(one) for one in given]


def _ids(given: object) -> list[int]:
    assert isinstance(given, list)
    return given


def _base64(row: Tensor) -> str:
    """A row f32[D] as OpenAI's clients decode it: little-endian."""
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii")
