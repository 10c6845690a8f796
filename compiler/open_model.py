"""The model that a compile is given, opened as its options ask for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import UsageError
from ..formats.weights import Weight, apply_weight
from .hf_model import meta_causal_lm
from .options import CompileOptions
from .quantizing import computed_codes, keeps_codes
from .sources import Source, open_source


def open_model(model: object, options: CompileOptions) -> Source:
    """The model that a user named, its weights in the type that it computes in."""
    wanted = options.dtype
    if not isinstance(model, nn.Module):
        if isinstance(model, str | Path) and str(model).lower().endswith(".onnx") and wanted:
            raise UsageError(
                "option dtype",
                expected="'auto' for an ONNX file, whose types are part of its graph",
                found=str(wanted),
                remedy="Leave it out.",
            )
        # On a CPU bfloat16 checkpoints are computed in float32: faster there, and closer to the
        # truth.
        return open_source(
            model,
            dtype=wanted or torch.float32,
            trust_remote_code=options.trust_remote_code,
            random_weights=options.random_weights,
            computes=computed_codes(options.target),
            codes=keeps_codes(options),
        )
    source = open_source(model, random_weights=options.random_weights)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), wanted)
    if wanted is None or wanted == own:
        return source
    if source.config is None:
        raise UsageError(
            "option dtype",
            expected=f"'auto' or {own} for a module that is in memory",
            found=str(wanted),
            remedy=f"Convert the module first: module.to({wanted}).",
        )
    weights: dict[str, Weight] = {
        name: apply_weight("cast", (weight,), dtype=wanted) if weight.dtype == own else weight
        for name, weight in source.weights.items()
    }
    return replace(source, module=meta_causal_lm(source.config, wanted), weights=weights)
