"""Requests of OpenAI's completions and chat completions, with vLLM's additions.

A field of the wrong type or out of its range is refused; fields that are not known are ignored, as
clients send many that say nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_MOST_CHOICES = 128
_MOST_PROMPTS = 2048
_MOST_MESSAGES = 4096
_MOST_TOKENS = 1 << 20  # of one prompt, or to stop at
_MOST_BIASES = 1024
_MOST_TOOLS = 128
_MOST_STOPS = 64
_LONGEST_STOP = 1024

Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# A row of logits must stay finite, or the step fails for all who are in it.
Repetition = Annotated[float, Field(ge=0.01, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Anything = TypeVar("Anything")
# A list that ends at its first item that is none: a million of such items make a million errors,
# which took a minute to list.
Items = Annotated[list[Anything], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema and its name."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = "response"
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)


class ResponseFormat(BaseModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class Form(BaseModel):
    """The form of the answer, as vLLM has it: one of these."""

    model_config = ConfigDict(populate_by_name=True)

    json_: dict[str, Any] | str | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False


class Function(BaseModel):
    """What a tool takes, as a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """The one function that the model has to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


def _few(found: object) -> object:
    """Looks at the number of biases first, because each wrong one is an error of its own."""
    if isinstance(found, dict) and len(found) > _MOST_BIASES:
        raise ValueError(f"at most {_MOST_BIASES} biases")
    return found


Biases = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)]
TokenIds = Annotated[Items[TokenId], Field(max_length=_MOST_TOKENS)]
Messages = Annotated[Items[dict[str, Any]], Field(max_length=_MOST_MESSAGES)]
Tools = Annotated[Items[Tool], Field(max_length=_MOST_TOOLS)]


class Sampled(BaseModel):
    """What both kinds of requests say of the sampling."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stop: Stop | Annotated[Items[Stop], Field(max_length=_MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # vLLM's additions
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Repetition | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=_MOST_TOKENS)] | None = None
    priority: int = 0
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Form | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampled):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[Items[str], Field(max_length=_MOST_PROMPTS)]
        | TokenIds
        | Annotated[Items[TokenIds], Field(max_length=_MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


class ChatRequest(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    # vLLM's additions
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
