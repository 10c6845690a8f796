"""Text of tokens that come one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"  # what an incomplete or invalid UTF-8 sequence decodes to


class Pieces(dict[int, str | None]):
    """The text of tokens wherever they stand behind other text: "" for those that have none, None
    for those whose neighbours have a say. Found out when a token first comes.

    Args:
        backend: the model of the `tokenizers` library.
        skip_special_tokens: whether these have no text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._backend, self._skips = backend, skip_special_tokens
        added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)
        self._adds_up = _adds_up(backend)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens that follow each other."""
        return str(self._backend.decode(list(ids), skip_special_tokens=self._skips))

    def is_byte(self, token_id: int) -> bool:
        """Whether a token stands for one byte, written as <0x..>."""
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def __missing__(self, token_id: int) -> str | None:
        self[token_id] = piece = self._piece(token_id)
        return piece

    def _piece(self, token_id: int) -> str | None:
        if self._backend.id_to_token(token_id) is None or token_id in self._skipped:
            return ""
        if not self._adds_up or self.is_byte(token_id):
            return None
        alone, twice = self.decode([token_id]), self.decode([token_id] * 2)
        # A part of a character, or, rarely, that character itself.
        broken = _REPLACEMENT in alone or _REPLACEMENT in twice
        return None if broken else twice[len(alone) :] or None


def _adds_up(backend: tokenizers.Tokenizer) -> bool:
    """Whether a text is that of its tokens in a row, but for parts of characters, byte tokens, and
    spaces that only the first token loses.

    ByteLevel joins the tokens' bytes; Metaspace and Replace write each token by itself, and Strip
    takes one space off the front. Others (WordPiece, CTC) look at what is beside a token.
    """
    if backend.decoder is None:
        return False
    # The one way to ask a decoder what it does; JSON.
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds[-1] == "Strip" and (steps[-1]["start"] > 1 or steps[-1]["stop"]):
        return False
    fused = ["Replace", "ByteFallback", "Fuse"]
    return kinds in (["ByteLevel"], ["Metaspace"], fused, [*fused, "Strip"])


class StreamDecoder:
    """Text of tokens that come one at a time.

    What `push` and a last `finish` return adds up to `decode` of all the tokens. `push` never
    returns part of a character: it keeps back what a later token may still change, which is an
    unfinished UTF-8 sequence, and a run of byte tokens (<0x..>), valid or not only as a whole.

    A token's text depends on its neighbours (a leading space vanishes at the start), so each step
    decodes a window that begins with the tokens of the step before. Where nothing is kept back, and
    there is text already, most tokens have the same text whenever they come: a look into a table.

    Args:
        pieces: of the tokenizer.
    """

    __slots__ = ("_context", "_emitted", "_last", "_pieces", "_window")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._window: list[int] = []
        self._emitted = ""  # the text of the window that is out already
        self._context = 0  # how many tokens of the window it belongs to
        self._last: int | None = None  # all is out, and this came last; the window is of no account

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, often that token's, sometimes ""."""
        piece = self._pieces[token_id]
        if piece == "":  # it does not end a run of byte tokens either
            return ""
        if self._last is None:
            return self._widen(token_id)
        if piece is None:
            self._window, self._context = [self._last], 1
            self._emitted = self._pieces.decode(self._window)
            return self._widen(token_id)
        self._last = token_id
        return piece

    def finish(self) -> str:
        """Return what was kept back; the stream may not go on after it."""
        return "" if self._last is not None else self._emit(final=True)

    def _widen(self, token_id: int) -> str:
        self._last = None
        self._window.append(token_id)
        return "" if self._pieces.is_byte(token_id) else self._emit(final=False)

    def _emit(self, final: bool) -> str:
        text = self._pieces.decode(self._window)
        if len(text) <= len(self._emitted) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        delta = text[len(self._emitted) :]
        if self._pieces[self._window[-1]]:
            self._last = self._window[-1]
            return delta
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._emitted = self._pieces.decode(self._window)
        return delta
