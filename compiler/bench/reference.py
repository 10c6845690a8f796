"""The uncompiled model: Hugging Face's own, from the same checkpoint, with its KV cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import UsageError
from ..sources import Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Run:
    """One generation.

    Attributes:
        token_ids: what came out.
        ttft: seconds from the prompt to the first token.
        itl: seconds of each token after it.
    """

    token_ids: list[int]
    ttft: float
    itl: list[float]


class ReferenceModel:
    """A causal LM as transformers runs it, in float32.

    Args:
        path: a Hugging Face folder or a .gguf file.

    Raises:
        UsageError: not a causal LM.
        CheckpointError: files that are missing or damaged.
    """

    def __init__(self, path: str) -> None:
        source = open_source(path, dtype=torch.float32)
        if not source.is_causal_lm:
            raise UsageError(
                path,
                expected="a causal language model to compare with",
                found=source.kind,
                remedy="Name a Hugging Face folder or a .gguf file.",
            )
        self.model = materialize(source)

    def run(self, token_ids: list[int], new_tokens: int) -> Run:
        """Decodes greedily, past any end of sequence, timing each token.

        Of the prompt's logits only the last row is computed, as ``generate`` does it.
        """
        ids = torch.tensor([token_ids])
        with torch.inference_mode():
            started = time.perf_counter()
            result = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            tokens = [int(result.logits[0, -1].argmax())]
            last = time.perf_counter()
            ttft, itl = last - started, []
            while len(tokens) < new_tokens:
                result = self.model(
                    input_ids=torch.tensor([[tokens[-1]]]),
                    past_key_values=result.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
                tokens.append(int(result.logits[0, -1].argmax()))
                now = time.perf_counter()
                itl.append(now - last)
                last = now
        return Run(tokens, ttft, itl)


def materialize(source: Source) -> PreTrainedModel:
    """The source's module with its weights in memory, on the CPU."""
    from transformers import AutoModelForCausalLM

    assert source.config is not None
    # A new module: the source's is on the meta device and hooked for capture.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        source.config, dtype=torch.float32, attn_implementation="sdpa"
    )
    slots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [name for name, _ in model.named_parameters() if name not in source.weights]
    if missing:
        raise UsageError(
            source.name,
            expected="a weight for every parameter of the model",
            found=f"none for {missing[0]}",
            remedy="Compare with another checkpoint of this model.",
        )
    with torch.no_grad():
        for name, weight in source.weights.items():
            if name in slots:
                slots[name].copy_(weight.load())
    return model.eval()
