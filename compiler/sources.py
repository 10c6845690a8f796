"""What `compile()` takes, as one Source: module, Hugging Face model, folder, GGUF or ONNX file."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..errors import CheckpointError, UsageError
from ..formats.prequantized import CODES, read_prequantized
from ..formats.tokenizer import Tokenizer
from ..formats.weights import Held, Stored, Weight
from .hf_config import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..formats.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """A model with everything that is known about it.

    Attributes:
        kind: what was given.
        name: for reports: the path or the class name.
        module: the user's own for "module" and "model", else built on the meta device.
        weights: parameter or buffer name → expression. What is missing here (buffers that the
            module computes) is in the module itself.
        config: transformers' configuration; None for a plain module.
        eos_token_ids: tokens that end a completion.
        max_position_embeddings: longest sequence in tokens; None when the model sets no limit.
        tokenizer: folder with tokenizer.json, or the GGUF file; None when there is none.
        random_weights: the seed that the weights are drawn from; None when they are real.
        quantized_by: the ``quant_method`` of a checkpoint in codes, or "gguf"; None for one in
            numbers.
        notes: what is done otherwise than the checkpoint says.
        examples: what an ONNX file is captured with where the user gives no example inputs; None
            where its sizes are open.
        inputs: of an ONNX file, for messages: ``x[batch, 4]``.
    """

    kind: Literal["module", "model", "folder", "gguf", "onnx"]
    name: str
    module: nn.Module
    weights: Mapping[str, Weight]
    config: PreTrainedConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    max_position_embeddings: int | None = None
    tokenizer: Path | None = None
    random_weights: int | None = None
    quantized_by: str | None = None
    notes: tuple[str, ...] = ()
    examples: Mapping[str, object] | None = None
    inputs: tuple[str, ...] = ()

    @property
    def is_causal_lm(self) -> bool:
        """Whether it is captured as a causal LM over token ids."""
        return self.config is not None


def open_source(
    model: object,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    random_weights: int | None = None,
    computes: Collection[torch.dtype] = CODES,
    codes: bool = False,
) -> Source:
    """Opens what the user gave; no weight is read.

    Args:
        model: an nn.Module, a Hugging Face model, or a path to an HF folder, a .gguf or an .onnx
            file.
        dtype: of the parameters of a folder or file; None takes the folder's own, float32 for GGUF.
            An ONNX file keeps its own.
        trust_remote_code: whether a folder may bring Python code of its own.
        random_weights: a seed to draw a folder's weights from, instead of reading them.
        computes: the types of codes that the device has products of; activations that a quantized
            checkpoint would round to others stay as they are.
        codes: whether matrices that a GGUF file holds in codes become weights in codes.

    Raises:
        UsageError: another kind of object, a path to something else, or random weights for what is
            no folder.
        CheckpointError: files that are missing, damaged, or do not fit together.
        CaptureError: an architecture that transformers has no causal LM for.
    """
    is_folder = isinstance(model, str | Path) and Path(model).is_dir()
    if random_weights is not None and not is_folder:
        raise UsageError(
            "option random_weights",
            expected="a Hugging Face folder, of which only config.json is then read",
            found=str(model) if isinstance(model, str | Path) else type(model).__name__,
            remedy="Pass a folder with config.json, or leave the option out.",
        )
    if isinstance(model, nn.Module):
        return _from_causal_lm(model) if _is_causal_lm(model) else _from_module(model)
    if not isinstance(model, str | Path):
        raise UsageError(
            "model",
            expected="an nn.Module, a Hugging Face model, or a path to a folder, a .gguf or "
            "an .onnx file",
            found=type(model).__name__,
            remedy="Pass one of these.",
        )
    path = Path(model)
    if is_folder:
        return _from_folder(path, dtype, trust_remote_code, random_weights, computes)
    if not path.exists():
        raise CheckpointError(
            str(path),
            expected="a model folder, a .gguf or an .onnx file",
            found="nothing there",
            remedy="Check the path; models are not downloaded.",
        )
    if path.suffix.lower() == ".onnx":
        from .onnx_import import open_onnx

        return open_onnx(path)
    if path.suffix.lower() != ".gguf":
        raise UsageError(
            str(path),
            expected="a folder with config.json, a .gguf or an .onnx file",
            found=f"a file that ends in {path.suffix or 'nothing'}",
            remedy="Pass the folder that holds it.",
        )
    return _from_gguf(path, dtype, codes)


def _is_causal_lm(module: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not isinstance(module, PreTrainedModel):
        return False
    known = type(module).__name__ in _flat(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return known or (module.can_generate() and not module.config.is_encoder_decoder)


def _flat(names: object) -> set[str]:
    flat: set[str] = set()
    for name in names:  # type: ignore[attr-defined]
        flat.update((name,) if isinstance(name, str) else name)
    return flat


def _held(module: nn.Module) -> dict[str, Weight]:
    return {
        name: Held(tensor.detach(), name)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.device.type != "meta"
    }


def _from_module(module: nn.Module) -> Source:
    return Source("module", type(module).__name__, module, _held(module))


def _from_causal_lm(model: PreTrainedModel) -> Source:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    return Source(
        "model",
        type(model).__name__,
        model,
        _held(model),
        config=model.config,
        eos_token_ids=_ids(model.config.eos_token_id if generation is None else eos),
        max_position_embeddings=max_positions(model.config),
    )


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(part) for part in value)  # type: ignore[attr-defined]


def read_json(path: Path, required: bool) -> dict[str, object]:
    """An object of a checkpoint's folder; an empty one where a file is not there, nor required.

    Raises:
        CheckpointError: no file that is required, or no JSON.
    """
    if not path.exists() and not required:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            str(path.parent),
            expected="a folder with config.json and *.safetensors",
            found=f"no {path.name}",
            remedy="Pass the folder that save_pretrained wrote, or a .gguf file.",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path), expected="JSON", found=str(error), remedy="Copy the file again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            str(path),
            expected="a JSON object",
            found=type(found).__name__,
            remedy="Copy the file again.",
        )
    return found


def _from_folder(
    folder: Path,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    seed: int | None,
    computes: Collection[torch.dtype],
) -> Source:
    from .hf_checkpoint import checkpoint_weights, random_weights
    from .hf_config import folder_config
    from .hf_model import meta_causal_lm

    raw = read_json(folder / "config.json", required=True)
    config = folder_config(folder, raw, trust_remote_code)
    checkpoint = _checkpoint(folder) if seed is None else None
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = meta_causal_lm(config, dtype or own, trust_remote_code=trust_remote_code)
    generation = read_json(folder / "generation_config.json", required=False)
    settings, method = raw.get("quantization_config"), None
    notes: tuple[str, ...] = ()
    if checkpoint is None:
        assert seed is not None
        weights = random_weights(model, seed)
    elif isinstance(settings, dict) and settings:
        method = str(settings.get("quant_method"))
        read = read_prequantized(checkpoint, settings, str(folder), computes)
        weights = checkpoint_weights(model, read.weights, str(folder), read.linears)
        notes = read.notes
    else:
        stored = {name: Stored(checkpoint, name) for name in checkpoint.names()}
        weights = checkpoint_weights(model, stored, str(folder))
    return Source(
        "folder",
        str(folder),
        model,
        weights,
        config=config,
        eos_token_ids=_ids(generation.get("eos_token_id", config.eos_token_id)),
        max_position_embeddings=max_positions(config),
        tokenizer=folder if (folder / "tokenizer.json").exists() else None,
        random_weights=seed,
        quantized_by=method,
        notes=notes,
    )


def _checkpoint(folder: Path) -> Checkpoint:
    """The folder's weights; the error for a folder without any says how to do without."""
    from ..formats.checkpoint import open_checkpoint

    try:
        return open_checkpoint(folder)
    except CheckpointError as error:
        if any(folder.glob("*.safetensors*")):
            raise
        raise CheckpointError(
            error.culprit,
            expected=error.expected,
            found=error.found,
            remedy=f"{error.remedy} To try the shapes without weights, compile with "
            "random_weights=SEED (--random-weights SEED).",
        ) from error


def _from_gguf(path: Path, dtype: torch.dtype | None, codes: bool) -> Source:
    from ..formats.gguf_model import read_gguf_model
    from ..formats.stored_codes import codes_of
    from .hf_checkpoint import fit_weights
    from .hf_config import make_config
    from .hf_model import meta_causal_lm

    stored = read_gguf_model(path, codes)
    config = make_config(dict(stored.config), str(path))
    model = meta_causal_lm(config, dtype or torch.float32)
    return Source(
        "gguf",
        str(path),
        model,
        fit_weights(model, stored.weights, str(path)),
        config=config,
        eos_token_ids=_ids(config.eos_token_id),
        max_position_embeddings=max_positions(config),
        tokenizer=path,
        quantized_by="gguf" if any(map(codes_of, stored.weights.values())) else None,
    )


def source_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a folder or file, None where there is none."""
    if source.tokenizer is None:
        return None
    if source.kind == "gguf":
        from ..formats.gguf import GGUFCheckpoint
        from ..formats.gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(GGUFCheckpoint(source.tokenizer))
    from ..formats.hf_tokenizer import read_hf_tokenizer

    return read_hf_tokenizer(source.tokenizer)
