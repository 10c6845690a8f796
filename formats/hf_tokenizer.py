"""The tokenizer of a Hugging Face folder, read by transformers at compile time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


def read_hf_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Read the tokenizer of a model folder; None where the folder has none.

    Nothing is downloaded, and no code of the folder is run.

    Raises:
        CheckpointError: its files are damaged, or it has no fast (`tokenizers`) form.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        source = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each tokenizer class raises its own
        raise CheckpointError(
            str(folder),
            expected="the tokenizer files of a Hugging Face model",
            found=f"{type(error).__name__}: {error}",
            remedy="Download tokenizer.json and tokenizer_config.json again.",
        ) from error
    return convert_hf_tokenizer(source, _generation_eos(folder))


def convert_hf_tokenizer(
    source: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...] = ()
) -> Tokenizer:
    """Take over a tokenizer object of transformers.

    Args:
        source: a fast tokenizer.
        eos_token_ids: the ends that the model's generation config names, beside the tokenizer's.

    Raises:
        CheckpointError: it is a slow (Python) tokenizer.
    """
    from tokenizers import Tokenizer as Backend

    backend = getattr(source, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            type(source).__name__,
            expected="a fast tokenizer",
            found="one without a tokenizer.json",
            remedy="Convert it: AutoTokenizer.from_pretrained(…).save_pretrained(…) with protobuf.",
        )
    ends = (source.eos_token_id, *eos_token_ids)
    template = source.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = ((name, getattr(source, name, None)) for name in names)
    config = TokenizerConfig(
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=source.bos_token_id,
        chat_template=template,
        special_tokens=tuple((name, str(text)) for name, text in special if text is not None),
    )
    return Tokenizer(Backend.from_str(backend.to_str()), config)


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """The end tokens in generation_config.json: an int, a list, or nothing."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            str(path),
            expected="a JSON object",
            found=str(error),
            remedy="Download it again, or delete it.",
        ) from error
    ends = value if isinstance(value, list) else [value]
    return tuple(end for end in ends if type(end) is int)
