"""Ollama's API: answers as lines of JSON, and what models there are."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import UsageError
from ..runtime.output import Completion, Delta
from ..runtime.params import SamplingParams
from ..runtime.structured import StructuredOutputsParams
from ..version import __version__
from .answers import split_calls
from .asking import conversation, encoded, json_form
from .body_route import add_posts
from .catalog import with_options, with_system
from .failures import Refused
from .ollama_models import add_models, listed, shown
from .ollama_protocol import Asked, GenerateRequest, OllamaChatRequest, ShowRequest
from .registry.manifest import Preset
from .replies import written
from .service import Prompts, Service

_NS = 10**9
_TAG = ":latest"


class Lines:
    """Answers to /api/generate, and to /api/chat.

    Args:
        model: the name that the client knows.
        chats: whether they are messages.
        tools: whether a message may hold calls of tools, which are sent when it is whole.
        prompt: token ids, to be sent back behind the answer's as `context`; None for none.
    """

    media_type: ClassVar[str] = "application/x-ndjson"
    done: ClassVar[bytes] = b""

    def __init__(self, model: str, *, chats: bool, tools: bool, prompt: list[int] | None) -> None:
        self.model, self._chats, self._tools, self._prompt = model, chats, tools, prompt

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        (completion,) = completions
        return self._end(completion) | self._text(completion.text)

    def pieces(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a stream sends for a delta."""
        if self._tools or not delta.text:
            return []
        return [self._object() | self._text(delta.text) | {"done": False}]

    def closing(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """The last line, which says what it took."""
        (completion,) = completions
        return [self._end(completion) | self._text(completion.text if self._tools else "")]

    def broken(self, status: int, message: str) -> dict[str, Any]:
        """The last line of a stream that fails."""
        return {"error": message}

    def frame(self, data: dict[str, Any]) -> bytes:
        """A line."""
        return written(data) + b"\n"

    def _object(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": datetime.now(UTC).isoformat()}

    def _text(self, text: str) -> dict[str, Any]:
        if not self._chats:
            return {"response": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._tools:
            message["content"], calls = split_calls(text)
            if calls:
                message["tool_calls"] = [_call(call["function"]) for call in calls]
        return {"message": message}

    def _end(self, completion: Completion) -> dict[str, Any]:
        times, usage = completion.timings, completion.usage
        found = self._object() | {
            "done": True,
            "done_reason": "stop" if completion.finish_reason == "stop" else "length",
            "total_duration": round(times.e2e * _NS),
            "load_duration": round(times.queue * _NS),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round(times.prefill * _NS),
            "eval_count": usage.completion_tokens,
            "eval_duration": round(times.decode * _NS),
        }
        if self._prompt is not None:
            found["context"] = [*self._prompt, *completion.token_ids]
        return found


def _call(function: dict[str, Any]) -> dict[str, Any]:
    """A call, its arguments as an object and not as text."""
    return {"function": {**function, "arguments": json.loads(function["arguments"])}}


def add_ollama(app: FastAPI, service: Service) -> None:
    """Adds the routes to an app."""
    _about(app, service)
    add_models(app, service)

    async def generate(body: GenerateRequest, http: Request) -> Response:
        """Completes a text, or answers it as a chat of one message."""
        read = partial(_generate, service, body)
        return await service.ask(http, read, streams=body.stream is not False)

    async def chat(body: OllamaChatRequest, http: Request) -> Response:
        """Answers a conversation."""
        read = partial(_chat, service, body)
        return await service.ask(http, read, streams=body.stream is not False)

    add_posts(app, {"/api/generate": generate, "/api/chat": chat})


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/api/version")
    async def version() -> dict[str, str]:
        """Of Tilewright."""
        return {"version": __version__}

    @app.get("/api/tags")
    async def tags(http: Request) -> dict[str, Any]:
        """The names that the engine answers to, and those of the registry."""
        service.access.who(http.headers.get("authorization"))
        others = await asyncio.to_thread(service.rules.catalog.entries)
        served = [_entry(service, name) for name in service.rules.models]
        taken = {one["name"] for one in served}
        return {"models": served + [listed(one) for one in others if str(one.name) not in taken]}

    @app.get("/api/ps")
    async def running(http: Request) -> dict[str, Any]:
        """The same: what is served is loaded."""
        service.access.who(http.headers.get("authorization"))
        device = service.engine.target.device_type
        found = [_entry(service, name) for name in service.rules.models]
        loaded = {"size_vram": found[0]["size"] if device == "cuda" else 0}
        loaded |= {"context_length": service.engine.config.max_model_len}
        return {"models": [one | loaded for one in found]}

    @app.post("/api/show")
    async def show(body: ShowRequest, http: Request) -> dict[str, Any]:
        """What is known of a model."""
        service.access.who(http.headers.get("authorization"))
        wanted = body.model or body.name or ""
        other = service.rules.catalog.entry(wanted)
        if (
            other is not None
            and other.manifest is not None
            and not service.rules.catalog.answers_for(other)
            and wanted.removesuffix(_TAG) not in service.rules.models
        ):
            facts = {"model_info": {}, "template": "", "capabilities": []}
            return listed(other) | shown(other.manifest.preset) | facts
        name = _model(service, wanted)
        tokenizer, config = service.engine.tokenizer, service.engine.config
        facts = {"general.architecture": service.engine.image.name}
        sizes = {"context_length": config.max_model_len, "vocab_size": config.vocab_size}
        return (
            _entry(service, name)
            | shown(service.preset(name))
            | {
                "template": (tokenizer and tokenizer.chat_template) or "",
                "model_info": facts | sizes,
                "capabilities": ["completion", "tools"],
            }
        )

    for verb in ("pull", "push"):
        app.add_api_route(f"/api/{verb}", _not_here, methods=["POST"], include_in_schema=False)


async def _not_here() -> Response:
    message = "models are neither downloaded nor uploaded: add files with `tilewright models add`"
    return JSONResponse({"error": message}, HTTPStatus.NOT_IMPLEMENTED)


def _entry(service: Service, name: str) -> dict[str, Any]:
    image = service.engine.image
    when = datetime.fromtimestamp(service.started, UTC).isoformat()
    full = name if ":" in name else name + _TAG
    names = {"name": full, "model": full, "modified_at": when}
    details = {"format": "tilewright", "family": image.name, "families": [image.name]}
    details |= {"parameter_size": "", "quantization_level": ""}
    digest = hashlib.sha256(f"{image.name} {image.target}".encode()).hexdigest()
    return names | {"size": service.bytes_of_weights, "digest": digest, "details": details}


def _model(service: Service, wanted: str) -> str:
    return service.model(wanted.removesuffix(_TAG))


def _generate(service: Service, body: GenerateRequest) -> tuple[Prompts, Lines]:
    name, engine = _model(service, body.model), service.engine
    preset, tokenizer = service.preset(name), engine.tokenizer
    if body.raw or tokenizer is None or tokenizer.chat_template is None:
        prompt = [*(body.context or ()), *encoded(engine, body.prompt)]
    else:
        system = preset.system if body.system is None else body.system
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": body.prompt})
        prompt = [*(body.context or ()), *conversation(engine, messages, preset.template_options)]
    lines = Lines(name, chats=False, tools=False, prompt=prompt)
    return [(prompt, _params(service, body, prompt, preset))], lines


def _chat(service: Service, body: OllamaChatRequest) -> tuple[Prompts, Lines]:
    name = _model(service, body.model)
    preset = service.preset(name)
    if not body.messages:
        raise UsageError(
            "messages", expected="at least one", found="none", remedy="Send a conversation."
        )
    tools = [tool.model_dump() for tool in body.tools or ()]
    variables: dict[str, Any] = {**preset.template_options, **({"tools": tools} if tools else {})}
    prompt = conversation(service.engine, with_system(body.messages, preset), variables)
    lines = Lines(name, chats=True, tools=bool(tools), prompt=None)
    return [(prompt, _params(service, body, prompt, preset))], lines


def _params(service: Service, body: Asked, prompt: list[int], preset: Preset) -> SamplingParams:
    options = with_options(body.options, preset)
    most = options.num_predict if options.num_predict > 0 else service.room(prompt)
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p or 1e-9,  # 0: the likeliest alone
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        stop=options.stop or (),
        max_new_tokens=most,
        deadline=service.rules.deadline,
        structured_outputs=_form(body.format),
    )


def _form(wanted: str | dict[str, Any] | None) -> StructuredOutputsParams | None:
    if not wanted:
        return None
    if isinstance(wanted, dict):
        return json_form(wanted)
    if wanted != "json":
        raise Refused(HTTPStatus.BAD_REQUEST, 'format: "json", or a JSON schema', param="format")
    return json_form(None)
