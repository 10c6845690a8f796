"""Maps the tensors of a Hugging Face checkpoint to the parameters of the module, as expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError, GraphError
from ..formats.random import parameter_weight
from ..formats.weights import Weight, apply_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps, WeightConverter

# Buffers that old checkpoints stored and that the modules compute themselves.
_COMPUTED = (
    r"rotary_emb\.inv_freq$",
    r"\.attn\.(bias|masked_bias)$",
    r"\.attention\.(bias|masked_bias)$",
)
_LISTED = 4


def checkpoint_weights(
    model: PreTrainedModel,
    stored: Mapping[str, Weight],
    where: str,
    in_codes: Collection[str] = (),
) -> dict[str, Weight]:
    """Weight name → expression over a checkpoint, for each parameter and persistent buffer.

    transformers' own table of renamings and conversions is followed (e.g. Mixtral's experts, which
    are stored one by one and stacked in the module). Each expression has its parameter's dtype.

    Args:
        model: on the meta device.
        stored: the tensors of the checkpoint by name.
        where: the folder or file, for messages.
        in_codes: the names of those that are quantized, [N, K] whatever the module's form is.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, stored in a way that has
            no expression, or tied in the module and different in the file.
    """
    slots = model.state_dict(keep_vars=True)
    sources, unknown = _collect(model, stored, slots, in_codes)
    found: dict[str, Weight] = {}
    for target, (converter, parts) in sources.items():
        found |= _convert(model, converter, target, parts, where)
    ignored = (*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    left = [
        name
        for name in unknown
        if not any(re.search(rule, name) for rule in ignored)
        and not _no_bias(name, stored, in_codes)
    ]
    return fit_weights(model, found, where, left)


def random_weights(model: PreTrainedModel, seed: int) -> dict[str, Weight]:
    """Weight name → expression that needs no file, for each parameter and persistent buffer.

    Norms are ones, everything else is random; tied parameters are one expression. What a parameter
    gets depends on the seed, its name, shape and dtype alone.

    Args:
        model: on the meta device.
        seed: 0 … 2⁶³ - 1.
    """
    slots = model.state_dict(keep_vars=True)
    first: dict[int, Weight] = {}
    return {
        name: first.setdefault(
            id(slot), parameter_weight(name, tuple(slot.shape), slot.dtype, seed)
        )
        for name, slot in slots.items()
    }


def fit_weights(
    model: PreTrainedModel, weights: Mapping[str, Weight], where: str, left: Sequence[str] = ()
) -> dict[str, Weight]:
    """`weights` for exactly the parameters and persistent buffers of `model`, in their dtypes.

    Args:
        left: names of stored tensors that found no place.

    Raises:
        CheckpointError: as `checkpoint_weights`.
    """
    slots = model.state_dict(keep_vars=True)
    found = {name: weight for name, weight in weights.items() if name in slots}
    left = [*left, *(name for name in weights if name not in slots)]
    _tie(found, slots, where)
    optional = tuple(model._keys_to_ignore_on_load_missing or ())
    lacking = [
        name
        for name in slots
        if name not in found and not any(re.search(rule, name) for rule in optional)
    ]
    if lacking or left:
        raise CheckpointError(
            where,
            expected=f"exactly the tensors of {type(model).__name__}",
            found="; ".join(
                [f"no tensor for {_some(lacking)}"] * bool(lacking)
                + [f"no place for {_some(left)}"] * bool(left)
            ),
            remedy="Check that config.json belongs to these weights.",
        )
    return {name: _fit(name, found[name], slots[name], where) for name in slots if name in found}


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def _no_bias(name: str, stored: Mapping[str, Weight], in_codes: Collection[str]) -> bool:
    """Whether it is a bias of zeros, which AutoGPTQ gave to linears that have none."""
    stem, _, suffix = name.rpartition(".")
    quantized = suffix == "bias" and f"{stem}.weight" in in_codes
    return quantized and not bool(stored[name].load().any())


def _is_turned(model: PreTrainedModel, target: str) -> bool:
    """Whether a module holds its weight as [K, N], as GPT-2's do."""
    return type(model.get_submodule(target.rpartition(".")[0])).__name__ == "Conv1D"


_Parts = dict[str, list[Weight]]


def _collect(
    model: PreTrainedModel,
    stored: Mapping[str, Weight],
    slots: Mapping[str, torch.Tensor],
    in_codes: Collection[str],
) -> tuple[dict[str, tuple[WeightConverter | None, _Parts]], list[str]]:
    """First target → (converter, stored tensors by source pattern), and names without a target."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    sources: dict[str, tuple[WeightConverter | None, _Parts]] = {}
    unknown = []
    for name in sorted(stored, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, slots)
        if target not in slots and name in slots:
            target, pattern = name, None
        if target not in slots:
            unknown.append(name)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        _, parts = sources.setdefault(target, (converter, {}))
        weight = stored[name]
        if name in in_codes and _is_turned(model, target):
            weight = apply_weight("permute", (weight,), dims=(1, 0))
        parts.setdefault(pattern or name, []).append(weight)
    return sources, unknown


def _convert(
    model: PreTrainedModel,
    converter: WeightConverter | None,
    target: str,
    parts: _Parts,
    where: str,
) -> dict[str, Weight]:
    """Target names → expressions, by the converter's operations in their order."""
    if converter is None:
        return {target: next(iter(parts.values()))[-1]}
    held: dict[str, Weight | list[Weight]] = {
        pattern: parts[pattern] for pattern in converter.source_patterns if pattern in parts
    }
    targets = list(converter.target_patterns)
    for operation in converter.operations:
        try:
            held = _operate(operation, held, targets, model, target)
        except (GraphError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{where}: {target}",
                expected="a stored form that Tilewright can convert",
                found=f"transformers' {type(operation).__name__} over {list(parts)} ({error})",
                remedy="Load the model with transformers, save it again, and compile that folder.",
            ) from error
    key = next((name for name in held if name in target), targets[0])
    start, _, end = target.partition(key)
    return {
        (f"{start}{name}{end}" if key in target else target): _single(weight)
        for name, weight in held.items()
    }


def _single(weight: Weight | list[Weight]) -> Weight:
    if isinstance(weight, Weight):
        return weight
    if len(weight) != 1:
        raise ValueError(f"{len(weight)} tensors where one was expected")
    return weight[0]


def _operate(
    operation: ConversionOps,
    held: Mapping[str, Weight | list[Weight]],
    targets: list[str],
    model: PreTrainedModel,
    target: str,
) -> dict[str, Weight | list[Weight]]:
    kind = type(operation).__name__
    if kind == "MergeModulelist":
        if len(held) == 1:
            return {targets[0]: _stack(next(iter(held.values())), operation.dim)}
        return {name: _stack(weights, operation.dim) for name, weights in held.items()}
    if kind == "Concatenate":
        flat = [part for weights in held.values() for part in _as_list(weights)]
        return {targets[0]: apply_weight("concat", tuple(flat), dim=operation.dim)}
    (weights,) = held.values()
    weight = _single(weights)
    if kind == "Transpose" and not operation.check_dims:
        dims = list(range(len(weight.shape)))
        a, b = operation.dim0, operation.dim1
        dims[a], dims[b] = dims[b], dims[a]
        return {targets[0]: apply_weight("permute", (weight,), dims=tuple(dims))}
    if kind == "Chunk" and operation.num_shards_attribute is None:
        return dict(
            _cut(
                weight,
                targets,
                operation.dim,
                [weight.shape[operation.dim] // len(targets)] * len(targets),
            )
        )
    if kind == "Split":
        names = [target.replace(targets[0], name) for name in targets]
        sizes = [model.get_parameter(name).shape[operation.dim] for name in names]
        return dict(_cut(weight, targets, operation.dim, sizes))
    raise ValueError("no expression for this operation")


def _as_list(weights: Weight | list[Weight]) -> list[Weight]:
    return [weights] if isinstance(weights, Weight) else weights


def _stack(weights: Weight | list[Weight], dim: int) -> Weight:
    def lift(weight: Weight) -> Weight:
        shape = list(weight.shape)
        shape.insert(dim, 1)
        return apply_weight("reshape", (weight,), shape=tuple(shape))

    return apply_weight("concat", tuple(lift(weight) for weight in _as_list(weights)), dim=dim)


def _cut(
    weight: Weight, targets: Iterable[str], dim: int, sizes: Sequence[int]
) -> Iterable[tuple[str, Weight]]:
    start = 0
    for name, size in zip(targets, sizes, strict=True):
        yield name, apply_weight("slice", (weight,), dim=dim, start=start, stop=start + size)
        start += size


def _tie(found: dict[str, Weight], slots: Mapping[str, torch.Tensor], where: str) -> None:
    """Gives all names of one parameter the expression of the first that is stored."""
    groups: dict[int, list[str]] = {}
    for name, slot in slots.items():
        groups.setdefault(id(slot), []).append(name)
    for names in groups.values():
        stored = [name for name in names if name in found]
        for name in stored[1:]:
            if found[stored[0]] != found[name] and not torch.equal(
                found[stored[0]].load(), found[name].load()
            ):
                raise CheckpointError(
                    f"{where}: {name}",
                    expected=f"the values of {stored[0]}, to which config.json ties it",
                    found="other values",
                    remedy='Set "tie_word_embeddings": false in config.json if these are two.',
                )
        for name in names:
            if stored:
                found[name] = found[stored[0]]


def _fit(name: str, weight: Weight, slot: torch.Tensor, where: str) -> Weight:
    if tuple(weight.shape) != tuple(slot.shape):
        raise CheckpointError(
            f"{where}: {name}",
            expected=f"shape {list(slot.shape)}",
            found=f"shape {list(weight.shape)}",
            remedy="Check that config.json belongs to these weights.",
        )
    if weight.dtype == slot.dtype:
        return weight
    return apply_weight("cast", (weight,), dtype=slot.dtype)
