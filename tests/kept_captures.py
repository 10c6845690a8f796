"""Captures of Hugging Face's models, kept for the session: torch.export takes a second or two for
each, over half of what compiling a tiny model does, and gives the same graph for the same code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tilewright.compiler import hf_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tilewright.compiler.capture_types import Captured

_EXPORT = torch.export.export


@contextmanager
def kept_captures() -> Iterator[None]:
    """While it lasts, what was captured once comes back with the tensors of the model at hand.

    A model is the same if its config, its parameters but for their values, and the code of its
    modules are. Where a test has put something else in torch.export's place, nothing is kept.
    """
    kept: dict[object, Captured] = {}
    capture = hf_model._capture

    def of(model: PreTrainedModel, route: str, length: int | None = None) -> Captured:
        if torch.export.export is not _EXPORT:
            return capture(model, route, length)
        key = (_identity(model), route, length)
        if key not in kept:
            found = capture(model, route, length)
            own = _tensors(model).keys()
            constants = {name: one for name, one in found.weights.items() if name not in own}
            kept[key] = replace(found, weights=constants)
            return found
        found, own = kept[key], _tensors(model)
        names = dict.fromkeys(found.weight_of.values())
        held = {name: found.weights.get(name, own.get(name)) for name in names}
        return replace(found, weights=held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_model, "_capture", of)
        yield


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _identity(model: PreTrainedModel) -> object:
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, int] = {}  # which are tied
    shapes = tuple(
        (name, tuple(t.shape), t.stride(), t.dtype, t.device, first.setdefault(id(t), place))
        for place, (name, t) in enumerate(tensors)
    )
    code = tuple((type(part), type(part).forward) for part in model.modules())
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    # What a module has put in an attribute of its own is part of it.
    own = tuple(vars(part).get("forward") for part in model.modules())
    return (config, model.config._attn_implementation, shapes, code, own)
