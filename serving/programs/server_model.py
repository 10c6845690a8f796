"""A server that speaks OpenAI's API as what fills a program's holes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from ...runtime.params import SamplingParams
from ...runtime.structured import StructuredOutputsParams
from .exchange import Busy, Exchange, ServerError
from .expressions import Gen, Sampling, Select
from .prompts import Outcome, Prompt

_TRIES = 6
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_DEFAULTS = SamplingParams()


class ServerModel:
    """A server.

    Args:
        url: of its API, such as http://localhost:8000/v1.
        api_key: to be sent with each request; None for none.
        model: its name there; None for the one that the server has.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self._url, self._named = url.rstrip("/"), {} if model is None else {"model": model}
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    async def __aenter__(self) -> ServerModel:
        """Nothing: each request has a connection of its own."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing."""

    async def generate(self, prompt: Prompt, ask: Gen, heard: Callable[[str], None]) -> Outcome:
        """Writes a text, and tells `heard` of it as it comes.

        Raises:
            ServerError: the server refuses it, breaks off, or does not keep to choices or to JSON.
        """
        form = ask.params.structured_outputs
        outcome = await self._ask(prompt, _sampled(ask.params) | _formed(form), heard)
        if form is not None and outcome.finish_reason == "stop":
            _check_formed(outcome.text, form)
        return outcome

    async def select(self, prompt: Prompt, ask: Select) -> Outcome:
        """A greedy answer that is held to the options.

        Raises:
            ServerError: as `generate`.
        """
        longest = max(len(option.encode()) for option in ask.options)  # no token is less than one
        form = StructuredOutputsParams(choice=ask.options)
        params = SamplingParams(max_new_tokens=longest + 1)
        outcome = await self._ask(prompt, _sampled(params) | _formed(form), lambda text: None)
        _check_formed(outcome.text, form)
        return outcome

    async def warm(self, prompt: Prompt) -> None:
        """Nothing: the server has its own ways."""

    async def _ask(
        self, prompt: Prompt, body: Mapping[str, Any], heard: Callable[[str], None]
    ) -> Outcome:
        where, asked = _prompted(prompt)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps({**asked, **body, **options, **self._named}).encode()
        for last in (False,) * (_TRIES - 1) + (True,):
            exchange = Exchange(self._url + where, self._headers, data, heard)
            try:
                return await asyncio.to_thread(exchange.run)
            except asyncio.CancelledError:
                exchange.abort()
                raise
            except Busy as busy:
                if last:
                    raise
                await asyncio.sleep(busy.seconds)
        raise AssertionError("the last try returns or raises")


def _prompted(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """Which of the API's paths takes it, and as what."""
    if prompt.turns is None:
        return "/completions", {"prompt": prompt.begun}
    if not prompt.begun:
        return "/chat/completions", {"messages": prompt.messages}
    begun = {"role": "assistant", "content": prompt.begun}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    return "/chat/completions", {"messages": [*prompt.messages, begun], **goes_on}


def _sampled(params: SamplingParams) -> dict[str, Any]:
    """What differs from the defaults, for servers that know OpenAI's fields alone, and what has
    other defaults there.
    """
    values = {name: getattr(params, name) for name in Sampling.__annotations__}
    kept = ("temperature", "max_new_tokens")
    return {
        _NAMES.get(name, name): value
        for name, value in values.items()
        if name in kept or value != getattr(_DEFAULTS, name)
    }


def _formed(form: StructuredOutputsParams | None) -> dict[str, Any]:
    if form is None:
        return {}
    if isinstance(form.json, str):
        schema = {"name": "answer", "schema": json.loads(form.json)}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": {form.kind: getattr(form, form.kind)}}


def _check_formed(text: str, form: StructuredOutputsParams) -> None:
    """Finds out servers that have passed over the field that asks for a form, where that shows."""
    if form.choice is not None:
        options, field = tuple(form.choice), "structured_outputs"
        fits, expected = text in options, f"one of {', '.join(map(repr, options))}"[:200]
    elif form.json is not None:
        fits, expected, field = _is_json(text), "JSON of the schema", "response_format"
    else:
        return
    if not fits:
        raise ServerError(
            "the server's answer",
            expected=expected,
            found=repr(text)[:80],
            remedy=f"Use a server that knows {field} (tilewright serve, vLLM), or an engine.",
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
