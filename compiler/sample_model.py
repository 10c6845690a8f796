"""The model that `verify="sample"` checks numbers on: the same one with one instance of each kind
of layer.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..errors import TilewrightError
from .hf_model import meta_causal_lm
from .sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER = re.compile(r"^(.*?\.)(\d+)\.(.*)$")


def sample_source(source: Source) -> Source | None:
    """The causal LM cut to its first layers, as many as it takes to have met every kind, and one
    more: a layer behind a layer may begin with other kernels than one behind the embedding. True
    widths.

    Returns:
        None where that is no smaller than the model, or where a cut model would not be the same
        one (no configuration, layers of unequal weights under one configuration).
    """
    if source.config is None:
        return None
    text = source.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    kinds = _distinct_prefix(source.module, getattr(text, "layer_types", None))
    if layers is None or kinds is None or kinds >= layers:
        return None
    kept = min(kinds + 1, layers - 1)
    config = _cut(source.config, kept)
    try:
        dtype = next(p.dtype for p in source.module.parameters() if p.is_floating_point())
        module = meta_causal_lm(config, dtype)
    except TilewrightError:
        return None
    names = dict(module.named_parameters())
    whole = dict(source.module.named_parameters())
    if any(name not in whole or whole[name].shape != p.shape for name, p in names.items()):
        return None
    weights = {n: w for n, w in source.weights.items() if n in names or _is_buffer(module, n)}
    return replace(source, module=module, weights=weights, config=config)


def _distinct_prefix(module: nn.Module, layer_types: object) -> int | None:
    """How many first layers hold one of each kind: kinds differ in weights' shapes or in type."""
    shapes: Mapping[int, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    stacks = set()
    for name, parameter in module.named_parameters():
        if match := _LAYER.match(name):
            stacks.add(match[1])
            shapes[int(match[2])].add((match[3], tuple(parameter.shape)))
    if len(stacks) != 1:
        return None
    kinds: dict[object, int] = {}
    types = list(layer_types) if isinstance(layer_types, list | tuple) else []
    for index in sorted(shapes):
        kind = types[index] if index < len(types) else None
        kinds.setdefault((frozenset(shapes[index]), kind), index)
    return max(kinds.values()) + 1 if kinds else None


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    return cut


def _is_buffer(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_buffers())
