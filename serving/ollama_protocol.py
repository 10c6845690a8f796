"""Requests of Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from .protocol import (
    Items,
    Messages,
    Penalty,
    Probability,
    Repetition,
    Stop,
    TokenIds,
    Tools,
)

Finite = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Options(BaseModel):
    """How an answer is sampled; what is left out is as Ollama has it, but for `repeat_penalty`,
    which is off.
    """

    temperature: Finite = 0.8
    top_k: Annotated[int, Field(ge=0)] = 40
    top_p: Probability = 0.9
    min_p: Probability = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    num_predict: Annotated[int, Field(ge=-2)] = -1
    stop: Stop | Annotated[Items[Stop], Field(max_length=64)] | None = None
    repeat_penalty: Repetition = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0


class Asked(BaseModel):
    """What both kinds of requests say."""

    model: str
    stream: bool | None = True
    format: str | dict[str, Any] | None = None
    options: Options | None = None


class GenerateRequest(Asked):
    """The body of POST /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    context: TokenIds | None = None


class OllamaChatRequest(Asked):
    """The body of POST /api/chat."""

    messages: Messages = Field(default_factory=list)
    tools: Tools | None = None


class ShowRequest(BaseModel):
    """The body of POST /api/show."""

    model: str | None = None
    name: str | None = None


class CreateRequest(BaseModel):
    """The body of POST /api/create."""

    model_config = ConfigDict(populate_by_name=True)

    model: str | None = None
    name: str | None = None
    from_: str | None = Field(default=None, alias="from")
    files: dict[str, str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    quantize: str | None = None
    stream: bool | None = True
    template: str | None = None
    adapters: dict[str, str] | None = None
    messages: list[dict[str, Any]] | None = None
    license: str | list[str] | None = None


class CopyRequest(BaseModel):
    """The body of POST /api/copy."""

    source: str
    destination: str


class DeleteRequest(BaseModel):
    """The body of DELETE /api/delete."""

    model: str | None = None
    name: str | None = None
