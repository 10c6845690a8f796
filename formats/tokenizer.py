"""The tokenizer of an engine: text ↔ token ids, chat templates, and text as it streams in.

It needs the `tokenizers` library and jinja2 alone, so that an engine runs without transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, UsageError
from .atomic import write_atomic
from .chat_template import render_chat
from .streaming import Pieces, StreamDecoder

if TYPE_CHECKING:
    import tokenizers

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What tokenizer.json does not say.

    Attributes:
        eos_token_ids: the tokens that end a completion; the first one is the template's eos_token.
        bos_token_id: the token that begins a text.
        chat_template: jinja2 source, as Hugging Face's chat templates.
        special_tokens: texts by the names that templates use, such as "bos_token".
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    chat_template: str | None = None
    special_tokens: tuple[tuple[str, str], ...] = ()


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the model of the `tokenizers` library; truncation and padding are switched off.
        config: end tokens and chat template.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config
        self._pieces: dict[bool, Pieces] = {}  # by whether special tokens are left out

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return self.config.eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the model has one."""
        return self.config.bos_token_id

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source of the chat template, if the model has one."""
        return self.config.chat_template

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, or more: those of bytes are written with one each."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text; spelled-out special tokens in it count as such.
            add_special_tokens: whether to add BOS (and what else the model begins and ends texts
                with); False for text from `apply_chat_template`, which spells them out.

        Raises:
            UsageError: the text is no str, or has half a surrogate pair in it.
        """
        if not isinstance(text, str):
            raise _no_text(text)
        try:
            # As `encode` does it, but without offsets, and without Python's lock: other threads,
            # the one that runs steps among them, go on meanwhile.
            [found] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(found.ids)
        except (TypeError, UnicodeError) as error:
            raise _no_text(text) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; invalid UTF-8 becomes U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """Write a conversation as the model expects it; encode it without special tokens.

        Args:
            messages: e.g. `[{"role": "user", "content": "Hi"}]`; plain JSON data.
            add_generation_prompt: whether to end with the opening of the assistant's turn.
            variables: what else the template reads, such as `tools` or `enable_thinking`.

        Raises:
            UsageError: there is no template, it refuses the messages, or they are no JSON data.
        """
        if self.config.chat_template is None:
            raise UsageError(
                "chat template",
                expected="a model with a chat template",
                found="a model without one",
                remedy="Pass the prompt as plain text.",
            )
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **variables}
        special = dict(self.config.special_tokens)
        return render_chat(self.config.chat_template, {**special, **given})

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for tokens that come one at a time."""
        pieces = self._pieces.get(skip_special_tokens)
        if pieces is None:
            pieces = self._pieces[skip_special_tokens] = Pieces(self.backend, skip_special_tokens)
        return StreamDecoder(pieces)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder that exists."""
        config = {
            "bos_token_id": self.config.bos_token_id,
            "eos_token_ids": list(self.config.eos_token_ids),
            "special_tokens": dict(self.config.special_tokens),
            "chat_template": self.config.chat_template,
        }
        write_atomic(Path(folder) / _TOKENIZER, self.backend.to_str(pretty=True))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        write_atomic(Path(folder) / _CONFIG, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            CheckpointError: one of the two files is missing or damaged.
        """
        import tokenizers

        path = Path(folder) / _CONFIG
        try:
            config = _read_config(json.loads(path.read_text(encoding="utf-8")))
            path = Path(folder) / _TOKENIZER
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(
                str(path),
                expected="a file that Tilewright wrote",
                found=f"{type(error).__name__}: {error}",
                remedy="Restore it, or compile the model again.",
            ) from error
        return cls(backend, config)


def _read_config(data: Mapping[str, object]) -> TokenizerConfig:
    bos, eos, special = data["bos_token_id"], data["eos_token_ids"], data["special_tokens"]
    template = data["chat_template"]
    if not isinstance(eos, list) or not all(type(token) is int for token in eos):
        raise TypeError("eos_token_ids is no list of ints")
    if not (bos is None or type(bos) is int) or not isinstance(template, str | None):
        raise TypeError("bos_token_id or chat_template is of a wrong type")
    if not isinstance(special, dict) or not all(isinstance(text, str) for text in special.values()):
        raise TypeError("special_tokens does not map names to texts")
    return TokenizerConfig(tuple(eos), bos, template, tuple(special.items()))


def _no_text(text: object) -> UsageError:
    return UsageError(
        "text to encode",
        expected="a str of whole Unicode characters",
        found=repr(text)[:80],
        remedy="Pass one text, without lone surrogates.",
    )
