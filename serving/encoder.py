"""Texts to vectors, by an engine of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..runtime.module_engine import ModuleEngine

_MOST_ROWS = 64
_MOST_TOKENS = 8192  # of a batch, padding included


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """What is known of an encoder beside its engine.

    Attributes:
        name: of the model.
        dimensions: of a vector.
        max_length: tokens of a text, special ones included.
        vocab_size: token ids are below it.
        pad_id: the token that fills up rows; the mask hides it.
    """

    name: str
    dimensions: int
    max_length: int
    vocab_size: int
    pad_id: int


class Encoder:
    """An encoder that gives one vector a text.

    Args:
        engine: ``(ids i64[B, S], mask i64[B, S]) → f[B, D]``, of any B and S up to the longest.
        facts: of the model.
        tokenize: token ids of a text, special ones included; None where there is no tokenizer.
    """

    def __init__(
        self,
        engine: ModuleEngine,
        facts: EncoderFacts,
        tokenize: Callable[[str], list[int]] | None,
    ) -> None:
        self.engine, self.facts, self._tokenize = engine, facts, tokenize

    def token_ids(self, text: str | Sequence[int], place: int, *, cuts: bool = False) -> list[int]:
        """Token ids of one input.

        Args:
            text: text, or token ids that are taken as they are.
            place: which input it is, for messages.
            cuts: whether what is too long is cut, and not refused.

        Raises:
            UsageError: empty, too long, or no token of this model.
        """
        if isinstance(text, str) and self._tokenize is None:
            raise self._wrong(place, "token ids: the model has no tokenizer", "text")
        if not text:
            raise self._wrong(place, "text, or token ids", "nothing")
        if isinstance(text, str):
            assert self._tokenize is not None
            ids = self._tokenize(text)
        else:
            ids = list(text)
        if not ids:
            raise self._wrong(place, "at least one token", "none")
        if len(ids) > self.facts.max_length:
            if not cuts:
                most = f"up to {self.facts.max_length} tokens, special ones included"
                raise self._wrong(place, most, f"{len(ids)}")
            # The end stays: it is a special token that the model has seen behind every text.
            ids = [*ids[: self.facts.max_length - 1], ids[-1]]
        if not all(0 <= one < self.facts.vocab_size for one in ids):
            raise self._wrong(place, f"token ids below {self.facts.vocab_size}", "others")
        return ids

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Vectors f32[B, D] of length 1, in the order of the rows.

        Args:
            rows: token ids of each, as `token_ids` gives them.
        """
        found = torch.empty(len(rows), self.facts.dimensions, dtype=torch.float32)
        for places in _batches([len(row) for row in rows]):
            length = max(len(rows[place]) for place in places)
            ids = torch.full((len(places), length), self.facts.pad_id, dtype=torch.int64)
            mask = torch.zeros(len(places), length, dtype=torch.int64)
            for at, place in enumerate(places):
                row = torch.tensor(rows[place], dtype=torch.int64)
                ids[at, : len(row)], mask[at, : len(row)] = row, 1
            vectors = self.engine(ids, mask)
            assert isinstance(vectors, Tensor)
            found[places] = vectors.float()
        return found

    def _wrong(self, place: int, expected: str, found: str) -> UsageError:
        return UsageError(
            f"input[{place}] for {self.facts.name}",
            expected=expected,
            found=found,
            remedy="Correct it; a longer text can be embedded in parts.",
        )


def shortened(vectors: Tensor, dimensions: int) -> Tensor:
    """The first dimensions of vectors f32[B, D], again of length 1."""
    return torch.nn.functional.normalize(vectors[:, :dimensions], dim=-1)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows that are computed together: of like lengths, so that little is padding."""
    batch: list[int] = []
    # The longest goes first, so it is the length of its batch.
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        longest = lengths[batch[0]] if batch else lengths[place]
        if len(batch) == _MOST_ROWS or (len(batch) + 1) * longest > max(_MOST_TOKENS, longest):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
