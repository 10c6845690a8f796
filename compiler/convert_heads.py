"""A Hugging Face model with fewer KV heads, for training it further or for other engines."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..codegen.program import Json
from ..errors import UnsupportedError, UsageError
from ..formats.atomic import atomic_folder
from ..ir.graph import Graph, param_name
from ..passes.expressions import expression_of
from ..passes.heads import GQA, HeadPlan, convert_heads, resolve_heads
from ..passes.heads.convert import sites_of
from .heads.plan import make_heads, recognized
from .heads.report import heads_facts
from .hf_model import capture_causal_lm
from .lowering import lower
from .sources import Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CONTEXT = 8192  # tokens that samples are no longer than
_COPIED = ("token*", "vocab*", "merges*", "special_tokens*", "*.jinja", "generation_config.json")


def converted_model(
    model: nn.Module | str | Path, attention: str | GQA
) -> tuple[PreTrainedModel, dict[str, Json]]:
    """A causal LM of transformers with fewer KV heads, in memory.

    Args:
        model: of transformers, or a folder or .gguf file.
        attention: as `compile` takes it.

    Returns:
        The model, in evaluation mode, in the element type that it had (float32 for files); and
        what the conversion cost, as ``report()["attention"]`` has it.

    Raises:
        UsageError: no causal LM, or groups that do not divide its KV heads.
        UnsupportedError: heads that cannot be converted; or projections that are no parameters of
            their own, which `compile` converts, but no configuration of transformers describes.
    """
    config = resolve_heads(attention)
    source = open_source(model)
    if config is None or source.config is None:
        raise UsageError(
            "converted_model",
            expected="a causal LM of transformers, and a number of KV heads",
            found=f"{source.name} and {attention!r}",
            remedy="Pass a Hugging Face model, or a folder of one, and GQA(groups).",
        )
    graph = lower(capture_causal_lm(source.module), "converted", source.weights)
    limit = min(source.max_position_embeddings or _CONTEXT, _CONTEXT)
    plan = make_heads(graph, source, config, limit)
    assert plan is not None
    return _model(source, recognized(graph), plan), heads_facts(graph, plan)


def export_gqa(
    model: nn.Module | str | Path, folder: str | Path, attention: str | GQA
) -> dict[str, Json]:
    """Writes ``converted_model`` as a Hugging Face folder, with the tokenizer's files of a folder.
    It appears whole or not at all.

    Returns:
        What the conversion cost.

    Raises:
        UsageError: a place that is taken; and as ``converted_model``.
    """
    place = Path(folder)
    if place.exists():
        raise UsageError(
            f"folder {place}",
            expected="a new one",
            found="something there",
            remedy="Choose another name, or remove it.",
        )
    found, facts = converted_model(model, attention)
    with atomic_folder(place) as target:
        found.save_pretrained(target)
        if isinstance(model, str | Path) and Path(model).is_dir():
            for path in {path for name in _COPIED for path in Path(model).glob(name)}:
                shutil.copyfile(path, target / path.name)
    return facts


def _model(source: Source, before: Graph, plan: HeadPlan) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = _config(source, before, plan)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    after = convert_heads(before, plan)
    weights = dict(source.weights)
    weights |= {name: expression_of(after, name) for name in _names(before, plan)}
    strangers = [
        name
        for name, weight in weights.items()
        if name not in shapes or tuple(shapes[name].shape) != weight.shape
    ]
    if strangers:
        raise _indescribable(source, strangers[0])
    dtype = next(p.dtype for p in source.module.parameters() if p.is_floating_point())
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict({name: weight.load() for name, weight in weights.items()}, strict=False)
    if (generation := getattr(source.module, "generation_config", None)) is not None:
        model.generation_config = copy.deepcopy(generation)
    return model.eval()


def _names(graph: Graph, plan: HeadPlan) -> list[str]:
    """The weights that a plan changes, as they are called after it."""
    names = []
    for site in sites_of(graph, plan):
        names.append(param_name(site.output.operands[1]))
        for part in (site.q, site.k, site.v):
            names.append(part.name)
            if part.bias is not None:
                names.append(part.bias_name)
    return names


def _config(source: Source, graph: Graph, plan: HeadPlan) -> PreTrainedConfig:
    config = copy.deepcopy(source.config)
    sites = sites_of(graph, plan)
    if getattr(config, "num_key_value_heads", None) is None:
        raise _indescribable(source, "num_key_value_heads")
    assert config is not None
    config.num_key_value_heads = plan.config.groups
    if sites and getattr(config, "head_dim", None) is None:
        config.head_dim = sites[0].sizes[2]
    return config


def _indescribable(source: Source, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{source.name} as a model of transformers",
        expected="num_key_value_heads, and queries, keys and values that are parameters apart",
        found=f"another form, by {found}",
        remedy="Compile it with attention=…, which converts it too.",
    )
