"""Folders of encoders: which they are, how they pool, and an engine that does both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from ..formats.hf_tokenizer import read_hf_tokenizer
from ..runtime.module_engine import ModuleEngine
from ..serving.encoder import Encoder, EncoderFacts

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

Pooling: TypeAlias = Literal["mean", "cls"]

_LONGEST = 8192
_MODULES = "modules.json"  # sentence-transformers': what follows the transformer
_POOLED: dict[str, Pooling] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls"}
_POOLED |= {"cls_token": "cls"}


class Pooled(nn.Module):
    """An encoder and its pooling: ``(ids i64[B, S], mask i64[B, S]) → [B, D]``, of length 1.

    Args:
        model: gives a last hidden state [B, S, D].
        pooling: the mean of the tokens that the mask shows, or the first token.
    """

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector a row."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        if self.pooling == "cls":
            return nn.functional.normalize(hidden[:, 0], dim=-1)
        shown = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)


def is_encoder(path: str | Path) -> bool:
    """Whether a folder holds an encoder: by sentence-transformers' list of modules, or by an
    architecture that transformers knows and that is neither a causal LM nor an encoder–decoder.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False
    if (folder / _MODULES).is_file():
        return True
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    config = _read(folder / "config.json", dict)
    named = config.get("architectures") or [""]
    decodes = config.get("is_encoder_decoder") or config.get("is_decoder")
    if config.get("model_type") not in MODEL_MAPPING_NAMES or decodes:
        return False
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return named[0] not in causal and not str(named[0]).endswith("ForCausalLM") and bool(named[0])


def open_encoder(
    path: str | Path, backend: str = "auto", progress: Callable[[str, float], None] | None = None
) -> Encoder:
    """Compiles the encoder of a folder, for any batch and any length up to its longest.

    Raises:
        CheckpointError: files that are missing or damaged.
        UnsupportedError: modules or a pooling that are not known, or no encoder of text.
        TilewrightError: whatever `compile` says of it.
    """
    from .api import compile

    folder = Path(path)
    pooling = pooling_of(folder)
    model = _load(folder)
    config: Any = model.config
    longest = _longest(folder, config)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=longest)
    # Two tensors, as two inputs that are one tensor would be one input.
    ids, mask = (torch.ones(2, min(7, longest), dtype=torch.int64) for _ in range(2))
    sizes = {0: batch, 1: length}
    engine = compile(
        Pooled(model, pooling).eval(),
        (ids, mask),
        dynamic_shapes=(sizes, sizes),
        backend=backend,
        kv_cache=None,
        progress=progress,
    )
    tokenizer = read_hf_tokenizer(folder)
    facts = EncoderFacts(
        folder.name, config.hidden_size, longest, config.vocab_size, config.pad_token_id or 0
    )
    encode = None if tokenizer is None else tokenizer.encode
    return Encoder(cast(ModuleEngine, engine), facts, encode)


def pooling_of(folder: Path) -> Pooling:
    """How a folder's encoder pools: as its modules say; the mean where it has no such list.

    Raises:
        CheckpointError: a file that is missing or damaged.
        UnsupportedError: another module, or another pooling.
    """
    if not (folder / _MODULES).is_file():
        return "mean"
    pooling: Pooling | None = None
    for module in _read(folder / _MODULES, list):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(folder / str(module.get("path")) / "config.json")
        elif kind not in ("Transformer", "Normalize") or (
            kind == "Transformer" and module.get("path")
        ):
            raise _unsupported(folder / _MODULES, "Transformer, Pooling and Normalize", kind)
    if pooling is None:
        raise _unsupported(folder / _MODULES, "a Pooling", "none")
    return pooling


def _pooling(path: Path) -> Pooling:
    """Of a Pooling module: a name, or one flag of several that is set."""
    config = _read(path, dict)
    prefix = "pooling_mode_"
    flags = [key for key, on in config.items() if key.startswith(prefix) and on is True]
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [key.removeprefix(prefix) for key in flags]
    if len(modes) != 1 or modes[0] not in _POOLED:
        raise _unsupported(path, "mean or cls pooling", ", ".join(map(str, modes)) or "none")
    return _POOLED[modes[0]]


def _load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModel
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # each kind of file raises its own
        raise CheckpointError(
            str(folder),
            expected="an encoder with *.safetensors, of an architecture of transformers' own",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="Check the folder; save_pretrained writes such ones.",
        ) from error
    finally:
        logging.set_verbosity(before)
    # A pooler over the first token is of no use here, and checkpoints of masked LMs have none.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise CheckpointError(
            str(folder),
            expected="every weight of the encoder",
            found=f"no {missing[0]}" if missing else f"another shape: {info['mismatched_keys']}",
            remedy="Copy the checkpoint again.",
        )
    return cast("PreTrainedModel", model.eval())


def _longest(folder: Path, config: Any) -> int:
    """Tokens of the longest text."""
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= (config.pad_token_id or 0) + 1  # positions count from behind the padding's
    own = folder / "sentence_bert_config.json"
    told = _read(own, dict).get("max_seq_length") if own.is_file() else None
    return min(positions, _LONGEST, told if isinstance(told, int) and told > 0 else _LONGEST)


def _read(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path), expected="JSON", found=str(error), remedy="Copy the file again."
        ) from error
    if not isinstance(found, kind):
        raise CheckpointError(
            str(path),
            expected=f"a JSON {kind.__name__}",
            found=type(found).__name__,
            remedy="Copy the file again.",
        )
    return found


def _unsupported(path: Path, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        str(path), expected=expected, found=found, remedy="Use an encoder with these."
    )
