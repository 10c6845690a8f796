"""Configurations of Hugging Face folders and GGUF files, checked before a model is built."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CaptureError, CheckpointError
from ..formats.prequantized import check_method

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def folder_config(
    folder: Path, raw: dict[str, object], trust_remote_code: bool
) -> PreTrainedConfig:
    """The configuration of a folder whose config.json holds `raw`.

    Raises:
        CaptureError: an unknown architecture, one that is no causal LM, or one that needs code of
            the folder's own without trust_remote_code.
        CheckpointError: a checkpoint quantized in a way that is not known, or values that
            transformers refuses.
    """
    if raw.get("quantization_config"):
        check_method(raw["quantization_config"], str(folder / "config.json"))
        # The model is that of the plain architecture; its weights know of their codes.
        raw = {name: value for name, value in raw.items() if name != "quantization_config"}
    if trust_remote_code and raw.get("auto_map"):
        from transformers import AutoConfig

        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config
    return make_config(raw, str(folder))


def make_config(raw: dict[str, object], where: str) -> PreTrainedConfig:
    """The configuration object of a config.json's contents, for a causal LM of transformers' own.

    Raises:
        CaptureError: an unknown architecture, or one that is no causal LM.
        CheckpointError: values that transformers refuses.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind = str(raw.get("model_type") or "")
    listed = raw.get("architectures")
    named = str(listed[0]) if isinstance(listed, list) and listed else None
    classes = {name for entry in KNOWN.values() for name in _names(entry)}
    if kind not in KNOWN or (named is not None and named not in classes):
        wanted, pool = (named, classes) if kind in KNOWN else (kind, set(KNOWN))
        close = difflib.get_close_matches(wanted or "", sorted(pool), n=6, cutoff=0.4)
        custom = " (it brings its own code)" if raw.get("auto_map") else ""
        raise CaptureError(
            f"{where}: architecture {named or kind or '(none)'}{custom}",
            expected=f"one of transformers' {len(KNOWN)} causal LMs, such as "
            f"{', '.join(close or ['llama', 'qwen3', 'gemma3_text', 'mistral', 'gpt2'])}",
            found=f"model_type {kind!r}, architectures {listed}",
            remedy="Pass trust_remote_code=True if you trust the folder's code."
            if custom
            else "Load the model yourself and pass the module with example_inputs.",
        )
    try:
        fields = {name: value for name, value in raw.items() if name != "model_type"}
        config: PreTrainedConfig = AutoConfig.for_model(kind, **fields)
    except Exception as error:
        raise CheckpointError(
            f"{where}: config",
            expected=f"values that transformers' {kind} takes",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="Correct config.json.",
        ) from error
    return config


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence that the configuration allows, in tokens; None without a limit."""
    text = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        limit = getattr(text, field, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None
