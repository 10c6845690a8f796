"""The tokenizer inside a GGUF file: its vocabulary and merges → the `tokenizers` library's model.

Two kinds are known: "gpt2", BPE over bytes, whose text is first cut by a pattern that the field
tokenizer.ggml.pre names; and "llama", SentencePiece's BPE with byte fallback (Gemma's too). GGUF
does not hold a SentencePiece model's merges; they follow from its pieces and their scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .gguf import GGUFCheckpoint
from .tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.pre_tokenizers import PreTokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_UNDERSCORE = "\u2581"  # SentencePiece's spelling of a space

# End-of-turn tokens that some files do not name in tokenizer.ggml.eot_token_id.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")

_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")


def read_gguf_tokenizer(checkpoint: GGUFCheckpoint) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        CheckpointError: the file has none, or one of a kind or with a pre-tokenizer that is not
            known here (the known ones are listed), or fields that contradict each other.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = checkpoint.metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in builders:
        raise _wrong(checkpoint, "model", f"one of {', '.join(sorted(builders))}", repr(kind))
    tokens = _strings(checkpoint, "tokens")
    types = checkpoint.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise _wrong(checkpoint, "token_type", f"a type for each of {len(tokens)} tokens", "others")
    try:
        backend = builders[kind](checkpoint, tokens, types)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise _wrong(
            checkpoint, "tokens", "vocabulary and merges that agree", str(error)
        ) from error
    _add_tokens(backend, tokens, types)
    bos, eos = (_token_id(checkpoint, f"{name}_token_id", tokens) for name in ("bos", "eos"))
    _add_template(checkpoint, backend, tokens, bos, eos, sentencepiece=kind == "llama")
    return Tokenizer(backend, _config(checkpoint, tokens, types, bos, eos))


def _byte_level(
    checkpoint: GGUFCheckpoint, tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pre = checkpoint.metadata.get("tokenizer.ggml.pre")
    known = (*_GPT2, *_DIGITS_APART, *_LLAMA3, *_QWEN2)
    if not isinstance(pre, str) or pre not in known:
        raise _wrong(checkpoint, "pre", f"one of {', '.join(sorted(known))}", repr(pre))
    merges = _listed_merges(checkpoint)
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a piece that is a token as it is, whatever its merges would make of it
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(pre: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if pre in _GPT2:
        return ByteLevel(add_prefix_space=False)
    if pre in _DIGITS_APART:
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(steps)
    numbers = r"\p{N}{1,3}" if pre in _LLAMA3 else r"\p{N}"
    pattern = "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            numbers,
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    )
    split = Split(Regex(pattern), behavior="isolated")
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def _sentencepiece(
    checkpoint: GGUFCheckpoint, tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    gemma = str(checkpoint.metadata.get("general.architecture")).startswith("gemma")
    prefix = bool(checkpoint.metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    # llama.cpp spells Gemma's runs of spaces as spaces; merges need SentencePiece's spelling
    vocab = {_run_of_spaces(token): index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in checkpoint.metadata:
        merges = _listed_merges(checkpoint)
    else:
        pieces = [
            t for t, kind in zip(vocab, types, strict=True) if kind in (_NORMAL, _USER_DEFINED)
        ]
        # Gemma's scores do not follow the order of its merges, its ids do
        scores = None if gemma else _scores(checkpoint, len(tokens))
        merges = list(_merges(vocab, pieces, scores))
    unknown = _token_id(checkpoint, "unknown_token_id", tokens)
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[unknown] if unknown is not None else None,
        )
    )
    spaces = normalizers.Replace(" ", _UNDERSCORE)
    opening = [normalizers.Prepend(_UNDERSCORE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*opening, spaces])
    closing = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(_UNDERSCORE, " "), decoders.ByteFallback(), decoders.Fuse(), *closing]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _listed_merges(checkpoint: GGUFCheckpoint) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in _strings(checkpoint, "merges")]
    return [(first, second) for first, _, second in pairs]


def _run_of_spaces(token: str) -> str:
    return token.replace(" ", _UNDERSCORE) if token.strip(" ") == "" else token


def _merges(
    vocab: Mapping[str, int], pieces: Sequence[str], scores: Sequence[float] | None
) -> Iterator[tuple[str, str]]:
    """Each way to make a piece of two others, the best piece first; ties go to the lower ids."""
    if scores is not None:
        pieces = sorted(pieces, key=lambda piece: -scores[vocab[piece]])
    for piece in pieces:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(a, b) for a, b in halves if a in vocab and b in vocab]
        yield from sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Keep control and user-defined tokens whole in the text."""
    from tokenizers import AddedToken

    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=True)
            if kind == wanted and token.strip(" ")
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _add_template(
    checkpoint: GGUFCheckpoint,
    backend: tokenizers.Tokenizer,
    tokens: Sequence[str],
    bos: int | None,
    eos: int | None,
    sentencepiece: bool,
) -> None:
    """Put BOS before and EOS after each text, as the file says; llama.cpp's defaults otherwise."""
    from tokenizers.processors import TemplateProcessing

    metadata = checkpoint.metadata
    implied = sentencepiece or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    before = bos if metadata.get("tokenizer.ggml.add_bos_token", implied) else None
    after = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    around = {tokens[token]: token for token in (before, after) if token is not None}
    if around:
        first = [tokens[before]] if before is not None else []
        last = [tokens[after]] if after is not None else []
        backend.post_processor = TemplateProcessing(
            single=[*first, "$A", *last], special_tokens=list(around.items())
        )


def _config(
    checkpoint: GGUFCheckpoint,
    tokens: Sequence[str],
    types: Sequence[int],
    bos: int | None,
    eos: int | None,
) -> TokenizerConfig:
    ends = [eos, *(_token_id(checkpoint, f"{name}_token_id", tokens) for name in ("eot", "eom"))]
    ends += [i for i, t in enumerate(tokens) if types[i] == _CONTROL and t in _END_OF_TURN]
    template = checkpoint.metadata.get("tokenizer.chat_template")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _token_id(checkpoint, f"{key}_token_id", tokens) for name, key in names.items()}
    return TokenizerConfig(
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        bos_token_id=bos,
        chat_template=template if isinstance(template, str) else None,
        special_tokens=tuple((name, tokens[i]) for name, i in ids.items() if i is not None),
    )


def _token_id(checkpoint: GGUFCheckpoint, key: str, tokens: Sequence[str]) -> int | None:
    value = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
        raise _wrong(checkpoint, key, f"an id below {len(tokens)}", repr(value))
    return value


def _strings(checkpoint: GGUFCheckpoint, key: str) -> list[str]:
    value = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(checkpoint, key, "a list of texts", type(value).__name__)
    return value


def _scores(checkpoint: GGUFCheckpoint, count: int) -> list[float]:
    value = checkpoint.metadata.get("tokenizer.ggml.scores")
    if not isinstance(value, list) or len(value) != count:
        raise _wrong(checkpoint, "scores", f"a score for each of {count} tokens", "others")
    return [float(score) for score in value]


def _wrong(checkpoint: GGUFCheckpoint, key: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.files()[0]}: metadata tokenizer.ggml.{key}",
        expected=expected,
        found=found,
        remedy="Convert the model again, or compile its Hugging Face folder instead.",
    )
