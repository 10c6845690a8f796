"""The uncompiled model: Hugging Face's own, from the same checkpoint or with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ...errors import UsageError
from ..sources import open_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ...formats.weights import Weight


class ReferenceModel:
    """A causal LM as transformers builds it, which eager and torch.compile run alike.

    Args:
        path: a Hugging Face folder or a .gguf file.
        dtype: of its parameters.
        device: where they are.
        random_weights: a seed: a folder's config.json is enough, and the weights are transformers'
            own initialisation (normal, std ``initializer_range``), drawn on the device.

    Attributes:
        config: of the model.
        model: made when it is first asked for, which may fail as whatever fills it does.

    Raises:
        UsageError: not a causal LM.
        CheckpointError: files that are missing or damaged.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        random_weights: int | None = None,
    ) -> None:
        self.path, self.dtype, self.device = path, dtype, device or torch.device("cpu")
        self.has_random_weights, self.seed = random_weights is not None, random_weights
        source = open_source(path, dtype=dtype, random_weights=random_weights)
        if source.config is None:
            raise UsageError(
                path,
                expected="a causal language model to compare with",
                found=source.kind,
                remedy="Name a Hugging Face folder or a .gguf file.",
            )
        self.config, self._weights = source.config, source.weights

    @cached_property
    def model(self) -> PreTrainedModel:
        """The module, with its weights on the device."""
        if self.seed is not None:
            torch.manual_seed(self.seed)
        model = build_model(self.config, self.dtype, self.device)
        if self.seed is None:
            fill_parameters(model, self._weights, self.path)
        return model


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The causal LM of a configuration, initialised on the device as transformers does it."""
    from transformers import AutoModelForCausalLM

    # A new module: that of a Source is on the meta device and hooked for capture.
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def fill_parameters(model: PreTrainedModel, weights: Mapping[str, Weight], name: str) -> None:
    """Copies a checkpoint's weights into the model, tensor by tensor, cast to its dtype.

    Raises:
        UsageError: a parameter that the checkpoint lacks.
    """
    slots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [each for each, _ in model.named_parameters() if each not in weights]
    if missing:
        raise UsageError(
            name,
            expected="a weight for every parameter of the model",
            found=f"none for {missing[0]}",
            remedy="Compare with another checkpoint of this model.",
        )
    with torch.no_grad():
        for each, weight in weights.items():
            if each in slots:
                slots[each].copy_(weight.load())
