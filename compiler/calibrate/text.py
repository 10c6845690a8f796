"""Samples of token ids from a text."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import UnsupportedError, UsageError
from ...formats.tokenizer import Tokenizer
from ...passes.schemes import QuantConfig

SAMPLE_TOKENS = 512
"""Tokens of a sample: long enough that most of its tokens have a context."""
PACKAGE_TEXT = "the package's"
"""What reports call the text that comes with the package."""
LEAST_TOKENS = 1024
"""A text with fewer says too little about any model."""


def read_text(path: str | Path | None) -> str:
    """A text file in UTF-8; None for the text of the package, of our own writing."""
    place = Path(__file__).with_name("text.txt") if path is None else Path(path)
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"text {place}",
            expected="a text file in UTF-8",
            found=f"{type(error).__name__}: {error}",
            remedy="Check the path, or leave it out for the text that comes with the package.",
        ) from error


def encode_text(
    tokenizer: Tokenizer, path: str | Path | None, least: int = LEAST_TOKENS
) -> list[int]:
    """The token ids of a text.

    Raises:
        UsageError: it cannot be read, or has fewer than ``least`` tokens.
    """
    ids = tokenizer.encode(read_text(path))
    if len(ids) < least:
        raise UsageError(
            f"text {path or 'of the package'}",
            expected=f"at least {least} tokens",
            found=str(len(ids)),
            remedy="Give a longer text.",
        )
    return ids


def calibration_samples(
    tokenizer: Tokenizer, config: QuantConfig, longest: int | None = None
) -> list[torch.Tensor]:
    """``text_samples`` as a configuration has them."""
    return text_samples(tokenizer, config.calibrate, config.tokens, config.seed, longest)


def text_samples(
    tokenizer: Tokenizer,
    path: str | Path | None,
    tokens: int,
    seed: int,
    longest: int | None = None,
) -> list[torch.Tensor]:
    """Token ids [1, S] of ``tokens`` tokens at most, S being 512 or the model's limit.

    Samples do not overlap; which ones are taken, of a text that has more, the seed decides.

    Raises:
        UsageError: a text that cannot be read or is too short.
    """
    ids = encode_text(tokenizer, path)
    length = min(SAMPLE_TOKENS, longest or SAMPLE_TOKENS)
    count = len(ids) // length
    generator = torch.Generator().manual_seed(seed)
    wanted = min(count, max(tokens // length, 1))
    chosen = torch.randperm(count, generator=generator)[:wanted].sort().values.tolist()
    return [torch.tensor([ids[i * length : (i + 1) * length]]) for i in chosen]


def measured_text(
    model: str, tokenizer: Tokenizer | None, limit: int | None, path: str | Path | None, tokens: int
) -> tuple[list[int], str]:
    """Token ids of a text to measure a model on, ``tokens`` of them at most, and what the text is
    called.

    Args:
        model: its name, for messages.
        tokenizer: None where it has none.
        limit: longest sequence of a causal LM, None for plain modules.
        path: of the text; None for that of the package.
        tokens: that are read at most.

    Raises:
        UnsupportedError: a plain module, or a model without a tokenizer.
        UsageError: a text that cannot be read or is too short.
    """
    if limit is None or tokenizer is None:
        raise UnsupportedError(
            f"quality report of {model}",
            expected="a causal LM with a tokenizer, to measure on text",
            found="a plain module" if limit is None else "no tokenizer",
            remedy="Compile a model folder or .gguf file, or leave the report out.",
        )
    name = PACKAGE_TEXT if path is None else Path(path).name
    return encode_text(tokenizer, path)[:tokens], name
