"""Holds the tokens of a sequence to a form: masks of what may come next, and tokens that must.

The library llguidance follows the text byte by byte, whatever the tokens are that it is made of. A
`Matcher` belongs to a sequence and not to its place in the KV memory, so that a preemption, which
computes the same tokens again, leaves it alone.

Where only one text can follow (the name of a property, the end of a word), its tokens are known
without the model. They are those that the tokenizer would make of the text, and a sequence takes
them one by one from the sampler, or all at once before the next step (`Sequence.accept`), with the
same result.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import TilewrightError, UnsupportedError, UsageError
from ..formats.tokenizer import Tokenizer
from .structured import StructuredOutputsParams, wrong

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_KEPT = 64  # compiled grammars; one of a large schema holds a few MB
_RUN = 3  # forced tokens that are worth a step of their own
_FEW = 2  # masks that one thread computes sooner than it would wake others


class Grammars:
    """Compiles forms for one model, and remembers the last of them.

    Args:
        tokenizer: of the model.
        eos_token_ids: that end an output where its form is complete; none: the tokenizer's own.
        vocab_size: of the model's logits.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Sequence[int], vocab_size: int | None
    ) -> None:
        self._tokenizer, self._eos = tokenizer, list(eos_token_ids)
        self._vocab_size = max(vocab_size or 0, tokenizer.vocab_size)
        self._compiled: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._tokens: LLTokenizer | None = None  # of a large vocabulary it takes a second to make
        self._lock = Lock()

    @property
    def words(self) -> int:
        """Of a mask, of 32 tokens each."""
        return len(_none(self._vocab_size))

    def matcher(self, params: StructuredOutputsParams, *, ignore_eos: bool = False) -> Matcher:
        """A matcher at the beginning of an output.

        Args:
            params: the form.
            ignore_eos: whether the output goes on for as long as its form can.

        Raises:
            UsageError: a form that cannot be compiled, or that no text has.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens = self._make_tokens()
            compiled = self._compiled.get(params)
            if compiled is None:
                compiled = self._compiled[params] = _compile(params, self._tokens)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(params)
            kept_out = frozenset(self._tokens.eos_tokens) if ignore_eos else frozenset()
            return Matcher(compiled.deep_copy(), self._vocab_size, kept_out)

    def _make_tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._tokenizer.backend.to_str()
        try:
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos or None)
        except ValueError as error:
            raise UsageError(
                "SamplingParams.structured_outputs",
                expected="a tokenizer whose tokens stand for bytes, as BPE's do",
                found=f"one that llguidance does not take: {error}",
                remedy="Leave structured_outputs out for this model.",
            ) from error


class Matcher:
    """Where one output stands in its form.

    Args:
        inner: of the library.
        vocab_size: how many tokens its masks tell of.
        kept_out: end-of-sequence tokens that are not to be chosen while anything else can.
    """

    __slots__ = ("_forced", "_inner", "_kept_out", "_vocab_size", "_words")

    def __init__(self, inner: LLMatcher, vocab_size: int, kept_out: frozenset[int]) -> None:
        self._inner, self._vocab_size, self._kept_out = inner, vocab_size, kept_out
        self._words: NDArray[np.int32] | None = None  # the mask, one bit a token
        self._forced = deque(inner.compute_ff_tokens())

    @property
    def stopped(self) -> bool:
        """Whether nothing can follow, other than an end-of-sequence token."""
        return self._inner.is_stopped()

    @property
    def forced(self) -> int | None:
        """The next token, if there is no choice."""
        return self._forced[0] if self._forced else None

    @property
    def forces_run(self) -> bool:
        """Whether so many tokens are forced that they had better be computed together."""
        return len(self._forced) >= _RUN

    def advance(self, token_id: int) -> None:
        """Takes the next token of the output."""
        self._words = None
        self._inner.consume_token(token_id)
        if self._forced and self._forced[0] == token_id:
            self._forced.popleft()
        else:
            self._forced.clear()
        if not self._forced and not self._inner.is_stopped():
            self._forced.extend(self._inner.compute_ff_tokens())

    def error(self) -> TilewrightError | None:
        """What went wrong, if anything did: the output does not have its form then."""
        if not self._inner.is_error():
            return None
        return UnsupportedError(
            "SamplingParams.structured_outputs",
            expected="a form that can be followed to its end",
            found=_problem(self._inner),
            remedy="Simplify the schema or grammar: fewer alternatives, fewer long repetitions.",
        )

    def words(self, early: Collection[int] = ()) -> NDArray[np.int32]:
        """What may come next, i32[ceil(V / 32)], token t at bit t % 32 of word t / 32; not empty.

        Args:
            early: tokens that are too early, and left out while there are others.
        """
        if self._words is None:
            prepare([self])
        found = self._words
        assert found is not None
        unwanted = [token for token in (*self._kept_out, *early) if _has(found, token)]
        if not unwanted:
            return found
        words = found.copy()
        bits = words.view(np.uint8)
        for token in unwanted:
            bits[token // 8] &= ~np.uint8(1 << token % 8)
        return words if words.any() else found


def prepare(matchers: Sequence[Matcher]) -> None:
    """Computes the next masks of several matchers, on several threads. To be called while the
    device computes the logits that they are for: llguidance takes up to a millisecond for a mask.
    """
    missing: list[Matcher] = []
    for matcher in matchers:
        if matcher._words is None:
            if matcher._forced:
                token, words = matcher._forced[0], _none(matcher._vocab_size)
                words.view(np.uint8)[token // 8] = 1 << token % 8
                matcher._words = words
            else:
                missing.append(matcher)
    if len(missing) <= _FEW:
        for matcher in missing:
            words = _none(matcher._vocab_size)
            matcher._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            matcher._words = words
        return
    block = np.empty((len(missing), -(-missing[0]._vocab_size // 32)), dtype=np.int32)
    rows = [(matcher._inner, row) for row, matcher in enumerate(missing)]
    _threads().unsafe_compute_mask_ptr(rows, block.ctypes.data, block[0].nbytes, len(rows))
    for matcher, words in zip(missing, block, strict=True):
        matcher._words = words


def _none(vocab: int) -> NDArray[np.int32]:
    return np.zeros(-(-vocab // 32), dtype=np.int32)


def _has(words: NDArray[np.int32], token: int) -> bool:
    """Whether a mask allows a token; one that it does not tell of is not."""
    place = token // 32
    return place < len(words) and bool(int(words[place]) >> token % 32 & 1)


def fill_masks(masks: Sequence[NDArray[np.int32] | None], block: NDArray[np.int32]) -> None:
    """Writes masks into i32[R, W], None for a row that allows all, as do those behind the last."""
    for row, mask in zip(block, masks, strict=False):
        row[:] = -1 if mask is None else mask
    block[len(masks) :] = -1


def left_out(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """What masks i32[N, W] leave out: bool[N, vocab] on their device. A token that they do not tell
    of is left out too.
    """
    if words.device.type == "cpu":
        inverted = ~words.numpy().view(np.uint8)
        bits = torch.from_numpy(np.unpackbits(inverted, axis=1, bitorder="little").view(np.bool_))
    else:
        packed = words.view(torch.uint8).int().flatten()
        bits = _table(words.device).index_select(0, packed).view(len(words), -1)
    if bits.shape[1] < vocab:
        bits = torch.nn.functional.pad(bits, (0, vocab - bits.shape[1]), value=True)
    return bits[:, :vocab]


@cache
def _table(device: torch.device) -> torch.Tensor:
    """bool[256, 8]: the bits of each byte that are 0."""
    numbers, bits = torch.arange(256, device=device), torch.arange(8, device=device)
    return (numbers[:, None] >> bits) & 1 == 0


def banned(
    masks: Sequence[NDArray[np.int32] | None], vocab: int, device: torch.device
) -> torch.Tensor:
    """What masks, of which there is one at least, leave out: bool[N, vocab] on the device; nothing
    where there is None.
    """
    width = max([len(mask) for mask in masks if mask is not None])
    words = torch.empty((len(masks), width), dtype=torch.int32, pin_memory=device.type == "cuda")
    fill_masks(masks, words.numpy())
    found = left_out(words.to(device, non_blocking=True), vocab)
    free = [row for row, mask in enumerate(masks) if mask is None]
    if free and width * 32 < vocab:  # tokens that no mask tells of
        found[free] = False
    return found


_executor: LLExecutor | None = None


def _threads() -> LLExecutor:
    """The library's threads, started when there is work for them."""
    global _executor
    if _executor is None:
        from llguidance import LLExecutor

        _executor = LLExecutor()
    return _executor


def _compile(params: StructuredOutputsParams, tokens: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher

    inner = LLMatcher(tokens, _source(params), log_level=0)
    if not inner.is_stopped():
        inner.compute_bitmask()  # may find out that nothing can come
    if inner.is_stopped() and not inner.is_accepting():
        raise wrong(params.kind, "a form that can be held to", _problem(inner))
    return inner


def _source(params: StructuredOutputsParams) -> str:
    """The form in the library's own terms."""
    from llguidance import LLMatcher

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, params.choice)))
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(_lark(params.grammar))
    schema = '{"type": "object"}' if params.json_object else params.json
    assert isinstance(schema, str)
    try:
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_flexible": not params.disable_any_whitespace,
                "whitespace_pattern": params.whitespace_pattern,
            },
        )
    except ValueError as error:
        raise wrong("json", "a JSON schema", _line(str(error))) from error


def _lark(grammar: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the converter's own, and those of its recursion
        raise wrong("grammar", "a grammar in Lark's EBNF or in GBNF", _line(str(error))) from error


def _problem(inner: LLMatcher) -> str:
    """Why a matcher cannot go on."""
    found = _line(inner.get_error()) or inner.stop_reason()
    return "a place where no text can follow" if found.startswith("NoExtension") else found


def _line(text: str) -> str:
    """The message of an error without the state that follows it."""
    return " ".join(text.split("<state")[0].split())[:300]
