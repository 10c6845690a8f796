"""Ollama's API over the registry: models are listed, shown, made, copied and deleted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import CheckpointError
from ..runtime.blobs import Blobs
from .failures import Refused
from .ollama_protocol import CopyRequest, CreateRequest, DeleteRequest
from .registry.manifest import Manifest, Preset
from .registry.names import ModelName, parse_name
from .registry.store import Entry, Registry
from .replies import written
from .service import Service

T = TypeVar("T")

_UNKEPT = ("template", "adapters", "messages", "license")


def add_models(app: FastAPI, service: Service) -> None:
    """Adds the routes to an app; without a registry they say that there is none."""
    registry = service.rules.catalog.registry
    if registry is None:
        for verb in ("create", "copy", "delete"):
            app.add_api_route(
                f"/api/{verb}", _no_registry, methods=["POST", "DELETE"], include_in_schema=False
            )
        return
    _blobs(app, service, registry.blobs)

    @app.post("/api/create")
    async def create(body: CreateRequest, http: Request) -> Response:
        """Makes a model of another one, or of files that were sent before."""
        await _with_key(http, service, lambda: _create(service, registry, body))
        done = [{"status": "writing manifest"}, {"status": "success"}]
        if body.stream is False:
            return JSONResponse(done[-1])
        return StreamingResponse(_lines(done), media_type="application/x-ndjson")

    @app.post("/api/copy")
    async def copy(body: CopyRequest, http: Request) -> Response:
        """Gives a model another name too."""

        def work() -> None:
            source, target = _known(registry, body.source), _free(service, body.destination)
            registry.copy(source, target)

        await _with_key(http, service, work)
        return Response()

    @app.delete("/api/delete")
    async def delete(body: DeleteRequest, http: Request) -> Response:
        """Takes a name away, and the files that no other name needs."""

        def work() -> None:
            wanted = body.model or body.name or ""
            _free(service, wanted)
            registry.remove(_known(registry, wanted))

        await _with_key(http, service, work)
        return Response()


def _blobs(app: FastAPI, service: Service, blobs: Blobs) -> None:
    @app.head("/api/blobs/{digest}")
    async def has(digest: str, http: Request) -> Response:
        """Whether a file has been sent."""
        service.access.who(http.headers.get("authorization"))
        return Response(status_code=200 if digest in blobs else 404)

    @app.post("/api/blobs/{digest}")
    async def send(digest: str, http: Request) -> Response:
        """Takes a file, whatever its size, if it is what its digest says."""
        lease = service.enter(http)
        try:
            if digest in blobs:
                return Response()
            await _receive(blobs, digest, http)
        except CheckpointError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        except ClientDisconnect:  # nobody reads this
            return Response(status_code=HTTPStatus.BAD_REQUEST)
        finally:
            lease.close()
        return Response(status_code=HTTPStatus.CREATED)


async def _receive(blobs: Blobs, digest: str, http: Request) -> None:
    stack = ExitStack()
    try:
        file = await asyncio.to_thread(stack.enter_context, blobs.receiving(digest))
        async for piece in http.stream():
            await asyncio.to_thread(file.write, piece)
    except BaseException as error:
        stack.__exit__(type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(stack.close)  # hashes it all


async def _no_registry() -> Response:
    message = "this server keeps no models: start it with `tilewright serve`"
    return JSONResponse({"error": message}, HTTPStatus.NOT_IMPLEMENTED)


async def _with_key(http: Request, service: Service, work: Callable[[], T]) -> T:
    """Does work on another thread for who may ask for it."""
    lease = service.enter(http)
    try:
        return await asyncio.to_thread(work)
    except CheckpointError as error:  # the files that the client has sent, or named
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
    finally:
        lease.close()


def _create(service: Service, registry: Registry, body: CreateRequest) -> Manifest:
    for field in _UNKEPT:
        if getattr(body, field):
            raise _refused(field, f"{field}: is not kept here; leave it out")
    if bool(body.from_) == bool(body.files):
        raise _refused("from", "from: the name of a model, or else files: their digests")
    name = _free(service, body.model or body.name or "")
    preset = Preset(body.system, body.parameters or {})
    if body.from_:
        return registry.derive(name, _known(registry, body.from_), preset, body.quantize)
    return registry.create(name, body.files or {}, preset, body.quantize)


def _known(registry: Registry, text: str) -> ModelName:
    name = parse_name(text)
    if name not in registry:
        error = registry.unknown(name.short)
        raise Refused(HTTPStatus.NOT_FOUND, str(error), param="model")
    return name


def _free(service: Service, text: str) -> ModelName:
    """A name that may be given to another model, or be taken away."""
    name = parse_name(text)
    if name.short in service.rules.models:
        raise Refused(
            HTTPStatus.CONFLICT,
            f"model {name.short!r} is being served: choose another name, or end the server first",
            param="model",
        )
    return name


def _refused(field: str, message: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, message, param=field)


def _lines(found: list[dict[str, str]]) -> Iterator[bytes]:
    return (written(one) + b"\n" for one in found)


def listed(entry: Entry) -> dict[str, Any]:
    """What /api/tags says of a model of the registry."""
    manifest = entry.manifest
    assert manifest is not None
    form = "gguf" if manifest.kind == "gguf" else "safetensors"
    details: dict[str, Any] = {"format": form, "family": "", "families": [], "parameter_size": ""}
    details |= {"quantization_level": manifest.quantize or ""}
    return {
        "name": str(entry.name),
        "model": str(entry.name),
        "modified_at": manifest.created,
        "size": manifest.size,
        "digest": manifest.digest.removeprefix("sha256:"),
        "details": details,
    }


def shown(preset: Preset) -> dict[str, Any]:
    """What /api/show says of how a model is asked."""
    lines = [
        f"{name} {json.dumps(value)}"
        for name, values in preset.parameters.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    found: dict[str, Any] = {"parameters": "\n".join(lines)}
    return found | ({} if preset.system is None else {"system": preset.system})
