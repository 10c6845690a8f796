"""The app: its routes, its limits of size, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..runtime.engine import CausalLMEngine
from ..runtime.prometheus import exposition
from ..version import __version__
from .answers import Answer, ChatAnswer
from .asking import chat_prompt, completion_prompts, response_form, sampling_params, tool_form
from .body_limit import BodyLimit
from .body_route import add_posts
from .catalog import with_parameters, with_preset
from .embeddings import refuse_embeddings
from .failures import handle_errors
from .ollama import add_ollama
from .protocol import ChatRequest, CompletionRequest
from .service import Prompts, Rules, Service
from .web import add_page


def make_app(engine: CausalLMEngine, rules: Rules) -> FastAPI:
    """The app that serves an engine; `app.state.service` answers its requests."""
    service = Service(engine, rules)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.close()

    app = FastAPI(title="Tilewright", version=__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(BodyLimit, most=rules.most_body)
    handle_errors(app)
    _openai(app, service)  # first, as routes are looked through in their order
    _about(app, service)
    add_ollama(app, service)
    refuse_embeddings(app)
    add_page(app, service)
    return app


def _about(app: FastAPI, service: Service) -> None:
    metrics = service.engine.metrics

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

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        text = await asyncio.to_thread(exposition, metrics)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of Tilewright."""
        return {"version": __version__}


def _openai(app: FastAPI, service: Service) -> None:
    def model(name: str) -> dict[str, Any]:
        length = service.engine.config.max_model_len
        found = {"id": name, "object": "model", "created": service.started}
        return found | {"owned_by": "tilewright", "max_model_len": length}

    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        """The names that the engine answers to."""
        service.access.who(http.headers.get("authorization"))
        names = await asyncio.to_thread(service.names)
        return {"object": "list", "data": [model(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, http: Request) -> dict[str, Any]:
        """One of them."""
        service.access.who(http.headers.get("authorization"))
        return model(service.model(name))

    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Completes texts."""
        read = partial(_completion, service, body)
        return await service.ask(http, read, streams=bool(body.stream))

    async def chat(body: ChatRequest, http: Request) -> Response:
        """Answers conversations."""
        read = partial(_chat, service, body)
        return await service.ask(http, read, streams=bool(body.stream))

    add_posts(app, {"/v1/completions": completions, "/v1/chat/completions": chat})


def _completion(service: Service, body: CompletionRequest) -> tuple[Prompts, Answer]:
    name, engine = service.model(body.model), service.engine
    body = with_parameters(body, service.preset(name))
    prompts = completion_prompts(engine, body)
    form = response_form(body.response_format)
    asked = [
        (
            prompt,
            sampling_params(
                body,
                max_tokens=body.max_tokens or service.room(prompt),
                logprobs=body.logprobs,
                form=form,
                deadline=service.rules.deadline,
            ),
        )
        for prompt in prompts
    ]
    texts = None
    if body.echo:
        tokenizer = engine.tokenizer
        texts = [tokenizer.decode(prompt) if tokenizer else "" for prompt in prompts]
    usage = body.includes_usage
    return asked, Answer(name, service.spell, texts, body.n or 1, includes_usage=usage)


def _chat(service: Service, body: ChatRequest) -> tuple[Prompts, Answer]:
    name, engine = service.model(body.model), service.engine
    body = with_preset(body, service.preset(name))
    prompt = chat_prompt(engine, body)
    called = tool_form(body)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens or service.room(prompt),
        logprobs=logprobs,
        form=called or response_form(body.response_format),
        deadline=service.rules.deadline,
    )
    calls = "only" if called else "none"
    if not called and body.tools and body.tool_choice != "none":
        calls = "maybe"
    n, usage = body.n or 1, body.includes_usage
    return [(prompt, params)], ChatAnswer(name, service.spell, n, calls, includes_usage=usage)
