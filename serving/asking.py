"""From what a client sends to what the engine takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..errors import UsageError
from ..runtime.engine import CausalLMEngine
from ..runtime.params import SamplingParams
from ..runtime.structured import BRIEF_SPACES, StructuredOutputsParams
from .protocol import ChatRequest, CompletionRequest, Form, NamedTool, ResponseFormat, Sampled, Tool
from .schemas import check_schema

_TAKEN = ("self", "messages", "add_generation_prompt")  # names that are no variables
_ROLES = ("system", "developer", "user", "assistant", "tool")


def completion_prompts(engine: CausalLMEngine, request: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt of a completion request.

    Raises:
        UsageError: text that cannot be encoded, or no prompt at all.
    """
    prompts = request.prompt
    if isinstance(prompts, str):
        return [encoded(engine, prompts)]
    if not prompts:
        raise _no_prompt()
    if set(map(type, prompts)) == {int}:
        return [cast("list[int]", prompts)]
    return [
        encoded(engine, one) if isinstance(one, str) else cast("list[int]", one) for one in prompts
    ]


def chat_prompt(engine: CausalLMEngine, request: ChatRequest) -> list[int]:
    """Token ids of a conversation, by the model's chat template.

    Raises:
        UsageError: the model has no chat template, or messages that it does not take.
    """
    variables: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if request.tools and request.tool_choice != "none":
        variables["tools"] = [tool.model_dump() for tool in request.tools]
    opens, goes_on = request.add_generation_prompt, request.continue_final_message
    if goes_on and (opens or request.messages[-1].get("role") != "assistant"):
        raise UsageError(
            "continue_final_message",
            expected="a last message of the assistant's, and add_generation_prompt false",
            found=f"a message of {str(request.messages[-1].get('role'))[:40]!r}, and "
            f"add_generation_prompt {str(opens).lower()}",
            remedy="End with the beginning of the answer, or leave it out.",
        )
    return conversation(engine, request.messages, variables, opens=opens, goes_on=goes_on)


def conversation(
    engine: CausalLMEngine,
    said: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    opens: bool = True,
    goes_on: bool = False,
) -> list[int]:
    """Token ids of messages, by the model's chat template, which also reads `variables`.

    Args:
        engine: of the model.
        said: the messages.
        variables: for the template.
        opens: whether the assistant's turn is opened at the end.
        goes_on: whether the last message is the beginning of that turn.

    Raises:
        UsageError: the model has no chat template, or messages that it does not take.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise UsageError(
            f"model {engine.image.name}",
            expected="a tokenizer and a chat template, for a conversation",
            found="none",
            remedy="Use /v1/completions with token ids.",
        )
    if taken := [name for name in _TAKEN if name in variables]:
        raise UsageError(
            "chat_template_kwargs",
            expected="variables beside the conversation",
            found=", ".join(taken),
            remedy="Send the conversation as messages.",
        )
    messages = [_message(place, one) for place, one in enumerate(said)]
    begun = messages.pop()["content"] if goes_on else ""
    opened = opens or goes_on
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=opened, **variables)
    check_length(engine, text + begun)
    return tokenizer.encode(text + begun, add_special_tokens=False)


def _message(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text in one piece."""
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise UsageError(
            f"messages[{place}].role",
            expected=", ".join(_ROLES),
            found=repr(role)[:40],
            remedy="Give each message its role.",
        )
    if isinstance(content, list):
        content = "".join(_part(place, part) for part in content)
    elif content is not None and not isinstance(content, str):
        raise _wrong_content(place, type(content).__name__)
    return {**message, "role": "system" if role == "developer" else role, "content": content or ""}


def _part(place: int, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise _wrong_content(place, f"a part of type {str(kind)[:40]}")


def _wrong_content(place: int, found: str) -> UsageError:
    return UsageError(
        f"messages[{place}].content",
        expected="text, or parts of type 'text'",
        found=found,
        remedy="Send text: this model sees no images and hears no sound.",
    )


def sampling_params(
    request: Sampled,
    *,
    max_tokens: int,
    logprobs: int | None,
    form: StructuredOutputsParams | None,
    deadline: float | None,
) -> SamplingParams:
    """How to sample an answer. What a client leaves out is as OpenAI has it: temperature 1.

    Raises:
        UsageError: values that do not go together.
    """
    stop = request.stop if request.stop is not None else ()
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p or (1e-9 if request.top_p == 0 else 1.0),  # 0: the likeliest alone
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias,
        max_new_tokens=max_tokens,
        min_new_tokens=min(request.min_tokens or 0, max_tokens),
        stop=stop,
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=request.ignore_eos,
        seed=request.seed,
        n=request.n or 1,
        logprobs=logprobs,
        cache_namespace=request.cache_salt or "",
        priority=request.priority,
        deadline=deadline,
        structured_outputs=_only_form(form, request.structured_outputs),
    )


def response_form(wanted: ResponseFormat | None) -> StructuredOutputsParams | None:
    """The form that a response_format asks for; None for any.

    Raises:
        UsageError: no schema beside "json_schema".
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_form(None)
    if wanted.json_schema is None:
        raise UsageError(
            "response_format.json_schema",
            expected="{'name': …, 'schema': …} beside the type 'json_schema'",
            found="none",
            remedy="Give the schema.",
        )
    return json_form(wanted.json_schema.schema_)


def _only_form(
    found: StructuredOutputsParams | None, form: Form | None
) -> StructuredOutputsParams | None:
    """The form found elsewhere, or that of vLLM's field; UsageError for both, and for no form."""
    if form is None:
        return found
    if found is not None:
        raise UsageError(
            "structured_outputs",
            expected="no response_format and no tool to be called beside it",
            found="both",
            remedy="Ask for the form in one of them.",
        )
    given = form.json_
    return StructuredOutputsParams(
        json=given,
        regex=form.regex,
        choice=form.choice,
        grammar=form.grammar,
        json_object=form.json_object,
        whitespace_pattern=BRIEF_SPACES if given is not None or form.json_object else None,
    )


def json_form(schema: Mapping[str, Any] | None) -> StructuredOutputsParams:
    """JSON of a schema; any object without one."""
    if schema is None:
        return StructuredOutputsParams(json_object=True, whitespace_pattern=BRIEF_SPACES)
    check_schema(schema)
    return StructuredOutputsParams(json=schema, whitespace_pattern=BRIEF_SPACES)


def tool_form(request: ChatRequest) -> StructuredOutputsParams | None:
    """The form of an answer that has to call a tool; None if it need not.

    Raises:
        UsageError: a choice of a tool that is not among the tools, or of any where there are none.
    """
    choice = request.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    tools = request.tools or []
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if not tools:
        known = ", ".join(tool.function.name for tool in request.tools or []) or "no tools"
        raise UsageError(
            "tool_choice",
            expected=f"one of the request's tools: {known}",
            found=choice.function.name if isinstance(choice, NamedTool) else "required",
            remedy="Send the tools that may be called.",
        )
    calls = [_call_schema(tool) for tool in tools]
    return json_form(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = tool.function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def check_length(engine: CausalLMEngine, text: str) -> None:
    """Refuses a text that no tokens of the context could spell, before anything encodes it: that
    takes seconds for megabytes.

    Raises:
        UsageError: it is too long.
    """
    assert engine.tokenizer is not None
    most = engine.config.max_model_len * engine.tokenizer.longest_token
    if len(text) > most:
        raise UsageError(
            "prompt",
            expected=f"a text for a context of {engine.config.max_model_len} tokens "
            f"(max_model_len), which is at most {most} characters",
            found=f"{len(text)} characters",
            remedy="Shorten it.",
        )


def encoded(engine: CausalLMEngine, text: str) -> list[int]:
    """Token ids of a text.

    Raises:
        UsageError: there is no tokenizer, or no token.
    """
    if engine.tokenizer is None:
        raise UsageError(
            f"model {engine.image.name}",
            expected="a tokenizer, for text",
            found="none",
            remedy="Send token ids.",
        )
    check_length(engine, text)
    ids = engine.tokenizer.encode(text)
    if not ids:
        raise _no_prompt()
    return ids


def _no_prompt() -> UsageError:
    return UsageError(
        "prompt",
        expected="at least one token",
        found="none",
        remedy="Send text, or token ids.",
    )
