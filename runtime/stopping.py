"""When a sequence ends, and which of its text is certain already."""

from __future__ import annotations

from typing import Protocol

from .output import FinishReason
from .params import SamplingParams


class StreamDecoder(Protocol):
    """Turns token ids into text one by one (formats/tokenizer.py has the real one)."""

    def push(self, token_id: int, /) -> str:
        """The text that this token makes certain; "" inside a character of several tokens."""
        ...

    def finish(self) -> str:
        """The text of a character that never became whole; call once, at the end."""
        ...


class StopStrings:
    """Cuts a text before the first stop string, however the text is divided into pieces.

    The stop string that is complete first wins; of two complete at the same character the longer.
    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._first = {stop[0] for stop in stops}
        self._tail = ""  # held back, and already searched

    def push(self, piece: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Takes the next piece of text.

        Args:
            piece: the text.
            may_stop: False while stop strings that end in this piece do not count.

        Returns:
            the text that is certain now, and whether a stop string was found, which ends it.
        """
        if not self._stops:
            return piece, False
        text = self._tail + piece
        if self._first.isdisjoint(text):  # most pieces
            self._tail = ""
            return text, False
        if may_stop:
            found = self._find(text, len(self._tail))
            if found is not None:
                self._tail = ""
                return text[:found], True
        held = self._held(text)
        self._tail = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """The text that was still held back."""
        text, self._tail = self._tail, ""
        return text

    def _find(self, text: str, searched: int) -> int | None:
        """Where the stop string begins that ends first after `searched` characters."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, searched + 1 - len(stop)))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return best[1] if best else None

    def _held(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        held = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0:
                if stop.startswith(text[start:]):
                    held = max(held, len(text) - start)
                    break
                start = text.find(stop[0], start + 1)
        return held


class StopChecker:
    """Follows one sequence's output and says when and why it ends.

    Args:
        params: the request's parameters.
        stop_ids: the tokens that end it: stop tokens, and end-of-sequence unless it is ignored.
        max_tokens: the most tokens it may generate: `max_new_tokens` or what the context leaves.
        decoder: for the text; None leaves the text empty.

    Attributes:
        num_tokens: that it has been told of.
        watches_text: whether what a token adds to the text may end it.
    """

    __slots__ = (
        "_decoder",
        "_max_tokens",
        "_min_tokens",
        "_stop_ids",
        "_strings",
        "_unread",
        "num_tokens",
        "watches_text",
    )

    def __init__(
        self,
        params: SamplingParams,
        stop_ids: frozenset[int],
        max_tokens: int,
        decoder: StreamDecoder | None,
    ) -> None:
        self._stop_ids, self._max_tokens, self._decoder = stop_ids, max_tokens, decoder
        self._min_tokens = params.min_new_tokens
        self._strings = StopStrings(params.stop_strings)
        self.num_tokens = 0
        self._unread: list[int] = []  # tokens whose text nobody has asked for
        self.watches_text = decoder is not None and bool(params.stop_strings)

    def skip(self, token_ids: list[int]) -> None:
        """Takes tokens that end nothing, of one that does not watch its text. It comes with that of
        later ones: of the next that is pushed, or of the end.
        """
        self.num_tokens += len(token_ids)
        if self._decoder is not None:
            self._unread += token_ids

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Takes the next token: the text that is certain now, and the reason if this is the end.

        A stop token adds no text.
        """
        self.num_tokens += 1
        may_stop = self.num_tokens >= self._min_tokens
        if may_stop and token_id in self._stop_ids:
            return self._rest(), "stop"
        text = ""
        if self._decoder is not None:
            text = self._read() if self._unread else ""
            text += self._decoder.push(token_id)
            if self.watches_text:
                text, stopped = self._strings.push(text, may_stop=may_stop)
                if stopped:
                    return text, "stop"
        if self.num_tokens >= self._max_tokens:
            return text + self._rest(), "length"
        return text, None

    def finish(self) -> str:
        """The text still held back, where something else ends the sequence; call once."""
        return self._rest()

    def _rest(self) -> str:
        if self._decoder is None:
            return ""
        rest = self._read() + self._decoder.finish()
        text, stopped = self._strings.push(rest)
        return text if stopped else text + self._strings.finish()

    def _read(self) -> str:
        assert self._decoder is not None
        unread, self._unread = self._unread, []
        return "".join(map(self._decoder.push, unread))
