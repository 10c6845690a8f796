"""A GGUF file as the Hugging Face model that it was converted from: its config and its weights.

llama.cpp's converter renames tensors and changes some; each change is undone here by a weight
expression, so that nothing is read before the engine loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, GraphError
from .gguf import GGUFCheckpoint, kept_codes
from .gguf_config import CONFIGS, Config, Fields
from .weights import Stored, Weight, apply_weight

_LAYER_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_EXTRA_MODULES: Mapping[str, tuple[str, ...]] = {
    "qwen3": _HEAD_NORMS,
    "gemma3": (*_HEAD_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_PERMUTED = frozenset({"llama"})
_NORM_PLUS_ONE = frozenset({"gemma3"})
_DERIVED = frozenset({"rope_freqs.weight"})  # read into the config

_Restore = Callable[[Weight], Weight]


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """What Hugging Face would have in config.json and in its state dict.

    Attributes:
        config: a plain dict with "model_type" and "architectures".
        weights: expressions by Hugging Face parameter name; "lm_head.weight" is there even where it
            is tied to the embedding (the two expressions are then equal).
        checkpoint: the file that the expressions read.
    """

    config: Config
    weights: Mapping[str, Weight]
    checkpoint: GGUFCheckpoint


def read_gguf_model(source: str | Path | GGUFCheckpoint, codes: bool = False) -> GGUFModel:
    """Describe a GGUF file as a Hugging Face model; no tensor but RoPE factors is read.

    Args:
        source: the file, or the checkpoint opened from it.
        codes: whether matrices that the file holds in codes are weights in codes
            (`stored_codes.codes_of` finds them); else float32 numbers, as gguf has them.

    Raises:
        CheckpointError: a damaged file, an unknown architecture (the known ones are listed),
            metadata that no family here has, a missing tensor, or one without a place.
    """
    checkpoint = source if isinstance(source, GGUFCheckpoint) else GGUFCheckpoint(source)
    architecture = checkpoint.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in CONFIGS:
        raise CheckpointError(
            f"{checkpoint.files()[0]}: general.architecture",
            expected=f"one of {', '.join(sorted(CONFIGS))}",
            found=repr(architecture),
            remedy="Compile the Hugging Face folder of this model instead.",
        )
    config = CONFIGS[architecture](Fields(checkpoint, architecture))
    try:
        weights = dict(_weights(checkpoint, architecture, config, codes))
    except GraphError as error:
        raise CheckpointError(
            str(checkpoint.files()[0]),
            expected="tensor shapes that fit the metadata",
            found=error.found,
            remedy="Convert the model again.",
        ) from error
    return GGUFModel(config, weights, checkpoint)


def _weights(
    checkpoint: GGUFCheckpoint, architecture: str, config: Config, codes: bool
) -> Iterator[tuple[str, Weight]]:
    names, used = set(checkpoint.names()), set(_DERIVED)
    for hf_name, gguf_name in _tensor_names(architecture, int(str(config["num_hidden_layers"]))):
        for suffix in (".weight", ".bias"):
            if gguf_name + suffix in names:
                used.add(gguf_name + suffix)
                restore = _restore(hf_name, architecture, config)
                yield hf_name + suffix, _read(checkpoint, gguf_name + suffix, restore, codes)
            elif suffix == ".weight" and hf_name == "lm_head":
                yield hf_name + suffix, _read(checkpoint, "token_embd.weight", _as_it_is, codes)
            elif suffix == ".weight":
                checkpoint.tensor(gguf_name + suffix)  # raises, and lists the closest names
    if unknown := sorted(names - used):
        raise CheckpointError(
            f"{checkpoint.files()[0]}: tensor {unknown[0]!r}",
            expected=f"only tensors of a {architecture} of {config['num_hidden_layers']} layers",
            found=f"{len(unknown)} others",
            remedy="Compile the Hugging Face folder of this model instead.",
        )


def _tensor_names(architecture: str, num_layers: int) -> Iterator[tuple[str, str]]:
    """Pairs of Hugging Face module and GGUF tensor, both without .weight or .bias."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kinds: dict[str, MODEL_ARCH] = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(kinds[architecture], num_layers)
    modules = _LAYER_MODULES + _EXTRA_MODULES.get(architecture, ())
    layers = [f"model.layers.{i}.{module}" for i in range(num_layers) for module in modules]
    for hf_name in ("model.embed_tokens", *layers, "model.norm", "lm_head"):
        yield hf_name, table.get_name(hf_name)


def _read(checkpoint: GGUFCheckpoint, name: str, restore: _Restore, codes: bool) -> Weight:
    kept = kept_codes(checkpoint, name) if codes else None
    if kept is None:
        return restore(Stored(checkpoint, name))
    # What the converter does to matrices moves whole rows, so each part's rows move alike.
    zero = None if kept.zero is None else restore(kept.zero)
    return replace(kept, codes=restore(kept.codes), scale=restore(kept.scale), zero=zero).weight()


def _restore(hf_name: str, architecture: str, config: Config) -> _Restore:
    """What undoes llama.cpp's converter, of one tensor."""
    if architecture in _NORM_PLUS_ONE and hf_name.endswith("norm"):
        return lambda weight: apply_weight("sub", (weight, 1.0))
    if architecture in _PERMUTED and hf_name.endswith(("q_proj", "k_proj")):
        heads = "num_attention_heads" if hf_name.endswith("q_proj") else "num_key_value_heads"
        return partial(_rotate_halves, num_heads=int(str(config[heads])))
    return _as_it_is


def _as_it_is(weight: Weight) -> Weight:
    return weight


def _rotate_halves(weight: Weight, num_heads: int) -> Weight:
    """Reorder each head's rows from pairs (x0, y0, x1, y1, …) to halves (x0, x1, …, y0, y1, …).

    ggml rotates neighbours, Hugging Face the two halves of a head. weight: [heads * D, …].
    """
    rows, *rest = weight.shape
    half = rows // num_heads // 2
    pairs = apply_weight("reshape", (weight,), shape=(num_heads, half, 2, *rest))
    halves = apply_weight("permute", (pairs,), dims=(0, 2, 1, *range(3, 3 + len(rest))))
    return apply_weight("reshape", (halves,), shape=weight.shape)
