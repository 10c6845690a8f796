"""What a server knows of names: those that it serves, and the registry's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import TilewrightError
from .ollama_protocol import Options
from .protocol import ChatRequest, CompletionRequest
from .registry.manifest import Preset
from .registry.names import parse_name
from .registry.store import Entry, Registry

Body = TypeVar("Body", ChatRequest, CompletionRequest)

# Parameters whose names OpenAI's requests have otherwise, as vLLM's additions do.
_NAMES = {"repeat_penalty": "repetition_penalty"}
_SYSTEM = ("system", "developer")


class Catalog:
    """Names and their presets.

    Args:
        registry: None for a server that keeps no models.
        checkpoint: of the engine that is served, if it is the registry's: models that share it are
            answered for too, each by its own preset.
        preset: of the names that are served.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        checkpoint: str | None = None,
        preset: Preset | None = None,
    ) -> None:
        self.registry, self.preset = registry, preset or Preset()
        self._checkpoint = checkpoint

    def entry(self, text: str) -> Entry | None:
        """What the registry has under a name, None for nothing."""
        if self.registry is None:
            return None
        try:
            name = parse_name(text)
            return Entry(name, self.registry.read(name))
        except TilewrightError:  # no name, or damaged: nothing that can be answered for
            return None

    def answers_for(self, entry: Entry | None) -> bool:
        """Whether the engine that is served is that of an entry."""
        if entry is None or entry.manifest is None or self._checkpoint is None:
            return False
        return entry.manifest.checkpoint == self._checkpoint

    def other_preset(self, text: str) -> Preset | None:
        """The preset of a name of the registry that the engine answers for too."""
        entry = self.entry(text)
        if entry is None or entry.manifest is None or not self.answers_for(entry):
            return None
        return entry.manifest.preset

    def entries(self) -> list[Entry]:
        """What the registry has; damaged ones are left out."""
        found = [] if self.registry is None else self.registry.entries()
        return [entry for entry in found if entry.manifest is not None]


def with_system(messages: Sequence[Mapping[str, Any]], preset: Preset) -> list[Mapping[str, Any]]:
    """A conversation, with the preset's system message where it has none."""
    if not preset.system or any(message.get("role") in _SYSTEM for message in messages):
        return [*messages]
    return [{"role": "system", "content": preset.system}, *messages]


def with_parameters(body: Body, preset: Preset) -> Body:
    """A request of OpenAI's API, with the preset's parameters where it says nothing."""
    unsaid: dict[str, Any] = {}
    for name, value in preset.parameters.items():
        field = _NAMES.get(name, name)
        if field in type(body).model_fields and getattr(body, field) is None:
            unsaid[field] = value
    most = preset.parameters.get("num_predict", -1)
    if isinstance(body, ChatRequest) and body.max_tokens is None and most > 0:
        unsaid["max_tokens"] = most
    return body.model_copy(update=unsaid)


def with_preset(body: ChatRequest, preset: Preset) -> ChatRequest:
    """A chat, with all that the preset says where it says nothing."""
    options = {**preset.template_options, **(body.chat_template_kwargs or {})}
    update: dict[str, Any] = {"messages": with_system(body.messages, preset)}
    update["chat_template_kwargs"] = options
    return with_parameters(body, preset).model_copy(update=update)


def with_options(options: Options | None, preset: Preset) -> Options:
    """Options of a request of Ollama's API, likewise."""
    said = options or Options()
    names = set(Options.model_fields) - said.model_fields_set
    unsaid = {name: value for name, value in preset.parameters.items() if name in names}
    return said.model_copy(update=unsaid)
