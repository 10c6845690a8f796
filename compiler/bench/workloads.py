"""What the users of ``bench serve`` say: prompts of random tokens, or from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UsageError


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        tokens: token ids of the prompt, behind what was said before.
        output_tokens: to generate.
    """

    tokens: list[int]
    output_tokens: int


Conversation = tuple[Turn, ...]
"""Each turn's prompt is all that was said before, answers too, and its own tokens."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How long prompts and answers are, and what they have in common.

    Attributes:
        input_tokens, output_tokens: of a turn, mean; shared tokens count.
        spread: lengths are uniform between so much below and above the mean, as a share of it (the
            range ratio of vLLM's random data).
        shared: share of `input_tokens` that is a prefix of several prompts.
        prefixes: how many of these there are.
        turns: of a conversation.
    """

    input_tokens: int = 1024
    output_tokens: int = 128
    spread: float = 0.0
    shared: float = 0.0
    prefixes: int = 1
    turns: int = 1

    @property
    def longest(self) -> int:
        """The most tokens that a conversation may come to."""
        return self.turns * (self._most(self.input_tokens) + self._most(self.output_tokens))

    def _most(self, mean: int) -> int:
        return math.ceil(mean * (1 + self.spread))

    def draw(self, rng: np.random.Generator, mean: int) -> int:
        """A length, at least 1."""
        low = max(1, math.floor(mean * (1 - self.spread)))
        return int(rng.integers(low, max(low, self._most(mean)) + 1))


def random_conversations(
    shape: Shape, requests: int, vocab: int, rng: np.random.Generator
) -> list[Conversation]:
    """So many requests of random tokens, in conversations of which the last may be shorter.

    Args:
        shape: of the conversations.
        requests: in all of them together.
        vocab: tokens are drawn below it.
        rng: for lengths and tokens.
    """
    common = round(shape.shared * shape.input_tokens)
    prefixes = [_tokens(vocab, rng, common) for _ in range(shape.prefixes)]
    found: list[Conversation] = []
    left = requests
    while left:
        count = min(left, shape.turns)
        left -= count
        turns = [_turn(shape, vocab, rng) for _ in range(count)]
        if common:
            first, prefix = turns[0], prefixes[int(rng.integers(len(prefixes)))]
            own = max(1, len(first.tokens) - common)
            turns[0] = Turn(prefix + first.tokens[-own:], first.output_tokens)
        found.append(tuple(turns))
    return found


def _turn(shape: Shape, vocab: int, rng: np.random.Generator) -> Turn:
    tokens = _tokens(vocab, rng, shape.draw(rng, shape.input_tokens))
    return Turn(tokens, shape.draw(rng, shape.output_tokens))


def _tokens(vocab: int, rng: np.random.Generator, count: int) -> list[int]:
    found: list[int] = rng.integers(vocab, size=count).tolist()
    return found


def read_conversations(
    path: Path, requests: int, output_tokens: int, encode: Callable[[str], list[int]]
) -> list[Conversation]:
    """The first so many requests of a file.

    Args:
        path: JSON lines: ``{"prompt": "text" or [token ids], "output_tokens": 128}``, as vLLM's
            custom data; other keys do not matter.
        requests: the most that are taken.
        output_tokens: where a line does not say.
        encode: text to token ids.

    Raises:
        UsageError: no such file, or a line of another form, by its number.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"option --file {path}",
            expected="a file of JSON lines",
            found=str(error),
            remedy="Check the path.",
        ) from error
    found: list[Conversation] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and len(found) < requests:
            found.append((_read(line, f"{path}, line {number}", output_tokens, encode),))
    if not found:
        raise UsageError(
            f"option --file {path}",
            expected="at least one prompt",
            found="none",
            remedy='Write a line such as {"prompt": "text", "output_tokens": 128}.',
        )
    return found


def _read(line: str, where: str, output_tokens: int, encode: Callable[[str], list[int]]) -> Turn:
    try:
        data = json.loads(line)
    except ValueError:
        data = None
    prompt = data.get("prompt") if isinstance(data, dict) else None
    count = data.get("output_tokens", output_tokens) if isinstance(data, dict) else None
    tokens: list[int] = []
    if isinstance(prompt, str) and prompt:
        tokens = encode(prompt)
    elif isinstance(prompt, list) and set(map(type, prompt)) <= {int}:
        tokens = prompt
    if not tokens or type(count) is not int or count < 1:
        raise UsageError(
            where,
            expected='a JSON object with "prompt", text or token ids, and perhaps "output_tokens", '
            "1 or more",
            found=line[:60],
            remedy='Write for example {"prompt": "text", "output_tokens": 128}.',
        )
    return Turn(tokens, count)


def arrival_times(
    count: int, rate: float, rng: np.random.Generator, *, fixed: bool = False
) -> list[float]:
    """When so many conversations begin, in seconds, rising.

    As `vllm bench serve` does it: gaps are exponential (a Poisson process), and stretched so that
    the last arrival comes at ``count / rate`` whatever was drawn.

    Args:
        count: at least 1.
        rate: a second, mean; infinity for all at once.
        rng: for the gaps.
        fixed: whether all gaps are alike.
    """
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.ones(count) if fixed else rng.exponential(size=count)
    ends = np.cumsum(gaps)
    times: list[float] = (ends * (count / rate / ends[-1])).tolist()
    return times


def num_requests(conversations: Iterable[Sequence[Turn]]) -> int:
    """Turns of all."""
    return sum(len(turns) for turns in conversations)
