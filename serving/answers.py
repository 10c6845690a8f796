"""From what the engine gives to what a client reads: OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..runtime.output import Completion, Delta, FinishReason, TokenLogprobs
from .failures import error_body
from .replies import written

_CALL, _CALLED = "<tool_call>", "</tool_call>"  # as Hermes and Qwen templates have them
_REASONS: dict[FinishReason | None, str | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "deadline": "length",  # OpenAI knows no other word for an answer that was cut
}


class Answer:
    """The objects that answer one request to /v1/completions.

    Args:
        model: the name that the client knows.
        spell: the text of a token.
        prompt_texts: to be sent before the answers, one a prompt; None for none (``echo``).
        n: answers a prompt.
        includes_usage: whether a stream ends with what it took.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"
    media_type: ClassVar[str] = "text/event-stream"
    done: ClassVar[bytes] = b"data: [DONE]\n\n"

    def __init__(
        self,
        model: str,
        spell: Callable[[int], str],
        prompt_texts: list[str] | None,
        n: int,
        *,
        includes_usage: bool = False,
    ) -> None:
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.model, self.n, self._includes_usage = model, n, includes_usage
        self._spell, self._prompts = spell, prompt_texts
        self._begun: set[int] = set()

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer to a request that does not stream; completions by prompt."""
        choices = [self._choice(index, one) for index, one in enumerate(completions)]
        return self._object(self.kind, choices, usage_of(completions, self.n))

    def pieces(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a stream sends for a delta of so many-th prompt."""
        index = prompt * self.n + delta.index
        first = index not in self._begun
        self._begun.add(index)
        choice = self._piece(index, prompt, delta, first=first)
        choice["finish_reason"] = _REASONS[delta.finish_reason]
        return [self._object(self.chunk_kind, [choice], None)]

    def closing(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """The last piece of a stream whose client wants to know what it took."""
        if not self._includes_usage:
            return []
        return [self._object(self.chunk_kind, [], usage_of(completions, self.n))]

    def broken(self, status: int, message: str) -> dict[str, Any]:
        """What a stream sends when it fails."""
        return error_body(status, message)

    def frame(self, data: dict[str, Any]) -> bytes:
        """A server-sent event."""
        return b"data: " + written(data) + b"\n\n"

    def _object(
        self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return found | {"choices": choices} | ({} if usage is None else {"usage": usage})

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echoed(index // self.n) + completion.text,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": _REASONS[completion.finish_reason],
        }

    def _piece(self, index: int, prompt: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        text = self._echoed(prompt) + delta.text if first else delta.text
        return {"index": index, "text": text, "logprobs": self._logprobs(delta.logprobs)}

    def _echoed(self, prompt: int) -> str:
        return "" if self._prompts is None else self._prompts[prompt]

    def _logprobs(self, found: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {
            "tokens": [self._spell(one.token_id) for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self._spell(t): value for t, value in one.top} for one in found],
            "text_offset": [],
        }


class ChatAnswer(Answer):
    """The objects that answer one request to /v1/chat/completions.

    Args:
        model: the name that the client knows.
        spell: the text of a token.
        n: answers.
        calls: "none", "maybe" (the model may write calls of tools into its text) or "only" (its
            text is one).
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        model: str,
        spell: Callable[[int], str],
        n: int,
        calls: str,
        *,
        includes_usage: bool = False,
    ) -> None:
        super().__init__(model, spell, None, n, includes_usage=includes_usage)
        self._calls = calls
        self._held: dict[int, str] = {}

    def pieces(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a stream sends for a delta. Where it may be a call, it is sent when it is whole."""
        if self._calls == "none":
            return super().pieces(prompt, delta)
        index = delta.index
        self._held[index] = self._held.get(index, "") + delta.text
        if delta.finish_reason is None:
            return []
        message, reason = self._message(self._held.pop(index), delta.finish_reason)
        for place, call in enumerate(message.get("tool_calls", ())):
            call["index"] = place
        choice = {"index": index, "delta": message, "logprobs": None, "finish_reason": reason}
        return [self._object(self.chunk_kind, [choice], None)]

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        message, reason = self._message(completion.text, completion.finish_reason)
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": reason,
        }

    def _message(self, text: str, reason: FinishReason) -> tuple[dict[str, Any], str | None]:
        content, calls = (text, [])
        if self._calls == "only":
            content, calls = "", [call for call in [_call(text)] if call]
            content = content if calls else text  # cut before its end
        elif self._calls == "maybe":
            content, calls = split_calls(text)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return message, "tool_calls" if calls else _REASONS[reason]

    def _piece(self, index: int, prompt: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        sent: dict[str, Any] = {"content": delta.text}
        if first:
            sent = {"role": "assistant", **sent}
        return {"index": index, "delta": sent, "logprobs": self._logprobs(delta.logprobs)}

    def _logprobs(self, found: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {"content": [self._token(one) for one in found], "refusal": None}

    def _token(self, one: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in one.top]
        return {**self._named(one.token_id, one.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token_id)
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text around calls of tools, and the calls; what is no whole call stays text."""
    calls: list[dict[str, Any]] = []
    kept = ""
    while True:
        before, opened, rest = text.partition(_CALL)
        inside, closed, after = rest.partition(_CALLED)
        call = _call(inside) if closed else None
        if not opened or not closed:
            return (kept + text).strip() if calls else kept + text, calls
        kept += before if call else before + opened + inside + closed
        calls += [call] if call else []
        text = after


def _call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = json.dumps(found.get("arguments", {}), ensure_ascii=False)
    function = {"name": found["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def usage_of(completions: Sequence[Completion], n: int) -> dict[str, Any]:
    """Token counts of a request: each prompt once, however many answers it has."""
    prompts = completions[::n]
    prompt = sum(one.usage.prompt_tokens for one in prompts)
    output = sum(one.usage.completion_tokens for one in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(p.usage.cached_tokens for p in prompts)},
    }
