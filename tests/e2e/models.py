"""Modules written by hand, as users write them: no Hugging Face code, no kernels of ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB, CONTEXT = 96, 64


class CausalSelfAttention(nn.Module):
    """softmax(QKᵀ / √D)V under a causal buffer, spelled out."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("tril", torch.tril(torch.ones(context, context)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x).split(width, dim=2))
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        mixed = scores.softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads, context)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token ids [B, S] → logits [B, S, V], with learned positions."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads, CONTEXT) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """BERT-like: bidirectional attention with a padding mask, post-norm, a pooled class."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, activation="gelu")
            for _ in range(layers)
        )
        self.pool = nn.Linear(width, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        return {"hidden": x, "label": torch.tanh(self.pool(x[:, 0])).softmax(-1)}


class MLP(nn.Module):
    """Three linear layers, and a second output of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, 32), nn.SiLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y, y.argmax(-1)


class Branching(nn.Module):
    """Control flow that depends on values: Dynamo breaks its graph here."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, int, None]:
        y = self.first(x).relu()
        y = y * 2 if y.sum() > 10 else y - 1
        return self.second(y), x.shape[0], None


def moved_off_init(module: nn.Module, std: float = 0.2) -> nn.Module:
    """The module in eval mode with weights whose greedy tokens vary, biases and norms included."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = std * torch.randn(parameter.shape)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return module.eval()


def greedy_without_cache(module: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The oracle: the whole sequence computed anew for each token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, module(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()
