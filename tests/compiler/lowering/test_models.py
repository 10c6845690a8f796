"""Whole models: Hugging Face causal LMs, a BERT-like encoder, a ViT and an MLP against torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captured_models import captured_model
from lowering_oracle import assert_same
from tilewright.compiler.lowering import foreign_ops, lower
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.printer import print_graph
from tiny_models import NAMED, VOCAB

# Beyond the named ones: ALiBi, chunks, routing by scatter, complex rotation.
OTHERS = ("mpt", "deepseek_v3", "llama4")
# The other named ones are held against Hugging Face's logits each day as engines (e2e).
APART = frozenset({"llama", "gpt2", "gemma2", "mixtral", *OTHERS})


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in APART else pytest.mark.nightly) for n in (*NAMED, *OTHERS)],
)
def test_causal_lm(name: str) -> None:
    model, captured = captured_model(name)
    graph = lower(captured, name)
    assert not foreign_ops(graph)
    assert parse_graph(print_graph(graph), graph.weights) == graph
    for length in (3, 13):
        ids = torch.randint(VOCAB, (1, length))
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
        (found,) = interpret(graph, [ids])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """A pre-norm encoder layer with attention through SDPA and an optional padding mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.second(x))


class Encoder(nn.Module):
    """Like BERT: token, position and type embeddings, a padding mask, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(40, 32)
        self.types = nn.Embedding(2, 32)
        self.blocks = nn.ModuleList([Block(32, 4) for _ in range(2)])
        self.pool = nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.places(places) + self.types(torch.zeros_like(ids))
        for block in self.blocks:
            x = block(x, seen[:, None, None, :].bool())
        return x, torch.tanh(self.pool(x[:, 0]))


class VisionTransformer(nn.Module):
    """Patches by convolution, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.ModuleList([Block(32, 4) for _ in range(2)])
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0]).softmax(-1)


def test_encoder_at_two_sizes() -> None:
    batch, length = torch.export.Dim("B", min=2, max=16), torch.export.Dim("S", min=2, max=40)

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.arange(length) < torch.randint(1, length, (batch, 1))
        return torch.randint(50, (batch, length)), seen.long()

    shape = {0: batch, 1: length}
    assert_same(
        Encoder().eval(),
        *inputs(3, 7),
        dynamic=(shape, shape),
        others=[inputs(2, 12)],
        tolerance=1e-5,
    )


def test_vision_transformer() -> None:
    assert_same(VisionTransformer().eval(), torch.randn(2, 3, 16, 16), tolerance=1e-5)


@pytest.mark.quick
def test_mlp() -> None:
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh())
    batch = {0: torch.export.Dim("B", max=64)}
    assert_same(mlp, torch.randn(3, 8), dynamic=(batch,), others=[(torch.randn(9, 8),)])
