"""Tiny models as TensorRT networks, run by the reference of the layers beside Hugging Face."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

import tilewright as tw
from tensorrt_reference import evaluate
from tilewright.codegen.base import get_backend
from tilewright.codegen.tensorrt.decoder import Lowered, lower_decoder
from tilewright.compiler.api import open_model
from tilewright.compiler.changes import changed_graphs, make_changes
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.compiler.options import resolve_options
from tilewright.ir.graph import Graph

STEPS, ROOM = 6, 32
# Prompts of two lengths, one of them beyond the windows of 8.
LENGTHS = (13, 5)


def graph_of(model: nn.Module, dtype: str, quantize: tw.QuantConfig | str | None = None) -> Graph:
    """The model's graph over slots, behind the passes."""
    options = resolve_options(
        target="cpu",
        backend="onnxruntime",
        kv_cache="static",
        dtype=dtype,
        max_model_len=ROOM,
        max_batch_size=None,
        verify="off",
        trust_remote_code=False,
        quantize=quantize,
        tune="none",
    )
    source = open_model(model, options)
    graph = lower(capture_causal_lm(source.module), "model", source.weights)
    heads, recipe = make_changes(graph, source, options, ROOM)
    backend = get_backend("onnxruntime")
    passed = changed_graphs(graph, "slot", backend, "off", None, options, recipe, heads)
    return passed.final


def lowered(model: nn.Module, dtype: str, quantize: tw.QuantConfig | str | None = None) -> Lowered:
    """Its network, with caches of ROOM tokens."""
    return lower_decoder(graph_of(model, dtype, quantize), {}, ROOM)


class Running:
    """A network with caches of a batch."""

    def __init__(self, found: Lowered, batch: int) -> None:
        self.network = found.network
        self.caches = {
            cache.past: torch.zeros(batch, cache.heads, ROOM, cache.width, dtype=cache.dtype.torch)
            for cache in found.caches
        }

    def __call__(self, ids: torch.Tensor, starts: list[int]) -> torch.Tensor:
        """Logits of all of the new tokens, f32[batch, length, vocabulary]."""
        rows = torch.arange(ids.shape[1]).expand(ids.shape)
        positions = torch.tensor(starts)[:, None] + rows
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": rows}
        return evaluate(self.network, {**feeds, **self.caches})["logits"].float()


def ragged_logits(found: Lowered, vocabulary: int) -> list[tuple[list[int], torch.Tensor]]:
    """Two prompts in one batch and ``STEPS`` greedy steps: each sequence, and the logits of all of
    its tokens.
    """
    running = Running(found, len(LENGTHS))
    generator = np.random.default_rng(0)
    tokens = [generator.integers(vocabulary, size=n).tolist() for n in LENGTHS]
    prompts = torch.tensor([row + [0] * (max(LENGTHS) - len(row)) for row in tokens])
    logits = [row[:n] for row, n in zip(running(prompts, [0, 0]), LENGTHS, strict=True)]
    for _ in range(STEPS):
        new = [[int(row[-1].argmax())] for row in logits]
        step = running(torch.tensor(new), [len(row) for row in tokens])
        tokens = [row + token for row, token in zip(tokens, new, strict=True)]
        logits = [torch.cat(pair) for pair in zip(logits, step, strict=True)]
    return list(zip(tokens, logits, strict=True))


def agrees_with_hugging_face(found: Lowered, model: PreTrainedModel) -> None:
    """Prefill and decode give the model's logits within 1e-4, and its greedy tokens."""
    for row, logits in ragged_logits(found, model.config.vocab_size):
        with torch.no_grad():
            wanted = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
        prompt = len(row) - STEPS
        assert row[prompt:] == wanted[prompt - 1 : -1].argmax(-1).tolist()
