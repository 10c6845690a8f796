"""Tiny models and single ops as TensorRT networks, run by the reference of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tilewright as tw
from tilewright.codegen.constants import is_constant
from tilewright.codegen.tensorrt.decoder import Lowered, lower_decoder
from tilewright.codegen.tensorrt.evaluate import evaluate
from tilewright.codegen.tensorrt.network import Layer, Network, Tensor
from tilewright.codegen.tensorrt.regions import CONVERTERS
from tilewright.codegen.tensorrt.writer import Refusal, Writer, leading
from tilewright.compiler.changes import make_changes
from tilewright.compiler.emit_source import captured, open_causal_lm, slot_graphs
from tilewright.compiler.options import resolve_options
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, input_name
from tiny_models import tiny_model

STEPS, ROOM = 6, 32
# Prompts of two lengths, one of them beyond the windows of 8.
LENGTHS = (13, 5)
# True widths, few layers and a short vocabulary; heads are 64 wide.
SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 1,
    },
}


@cache
def lowered(family: str, dtype: str) -> Lowered:
    """The network of a tiny model, or of one of SHAPES, with caches of ROOM tokens."""
    return lower_decoder(graph_of(family, dtype), {}, ROOM)


@cache
def graph_of(family: str, dtype: str, quantize: tw.QuantConfig | None = None) -> Graph:
    """That model's graph over slots, behind the passes."""
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
    source, graph = _captured(family, dtype)
    changes = make_changes(graph, source, options, ROOM)
    return slot_graphs(graph, changes, "off", (), options).final


@cache
def _captured(family: str, dtype: str):
    options = resolve_options(
        target="cpu",
        backend="onnxruntime",
        kv_cache="static",
        dtype=dtype,
        max_model_len=ROOM,
        max_batch_size=None,
        verify="off",
        trust_remote_code=False,
        tune="none",
    )
    model = shaped_model(family) if family in SHAPES else tiny_model(family)
    source = open_causal_lm(model, options)
    return source, captured(source, "model")


def shaped_model(shape: str) -> PreTrainedModel:
    """A model of one of SHAPES, its weights the library's random ones."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, head_dim=64, tie_word_embeddings=True, **SHAPES[shape])
    return LlamaForCausalLM(config).bfloat16()


def reads(network: Network, kind: str) -> list[Layer]:
    """The layers of a kind."""
    return [layer for layer in network.layers if layer.kind == kind]


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
        every = torch.arange(ids.numel())
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": every}
        logits = evaluate(self.network, {**feeds, **self.caches})["logits"].float()
        return logits.unflatten(0, tuple(ids.shape))


def ragged_logits(found: Lowered, vocabulary: int) -> list[tuple[list[int], torch.Tensor]]:
    """Two prompts in one batch and ``STEPS`` greedy steps: each sequence, and the logits of all of
    its tokens but the last.
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


def network_of(graph: Graph, max_len: int = ROOM) -> Network | Refusal:
    """A graph of token-major values, positions among its inputs or not, as a network."""
    w = Writer(graph, {}, CONVERTERS, max_len)
    w.parts.inputs.append(Tensor(w.parts.unique("position_ids"), DType.I64, ("batch", "length")))
    for node in graph.inputs:
        name = input_name(node)
        if name == "positions":
            w.values[node] = ("position_ids",)
            continue
        shape = (*(leading(node) or ("batch",)), *node.shape[1:])
        sizes = tuple(size if isinstance(size, int | str) else max_len for size in shape)
        w.parts.inputs.append(Tensor(w.parts.unique(name), node.dtype, sizes))
        w.values[node] = (name,)
    for node in graph.nodes:
        if node.op in ("input", "item") or is_constant(node):
            continue
        refusal = w.emit(node)
        if refusal is not None:
            return refusal
    names = zip(graph.output_names, graph.outputs, strict=True)
    return w.parts.network({f"{name}.out": w.value(node) for name, node in names})


def run_batch(
    network: Network, graph: Graph, inputs: Sequence[torch.Tensor], batch: int, starts: list[int]
) -> list[torch.Tensor]:
    """The network over token-major inputs of ``batch`` sequences, token-major again."""
    given: dict[str, torch.Tensor] = {}
    length = 1
    for node, x in zip(graph.inputs, inputs, strict=True):
        if leading(node):
            length = x.shape[0] // batch
            x = x.unflatten(0, (batch, length))
        given[input_name(node)] = x.clone()
    rows = torch.arange(length).expand(batch, length)
    given["position_ids"] = torch.tensor(starts)[:, None] + rows
    given = {tensor.name: given[tensor.name] for tensor in network.inputs}
    found = evaluate(network, given).values()
    return [
        x.flatten(0, 1) if leading(node) else x
        for x, node in zip(found, graph.outputs, strict=True)
    ]
